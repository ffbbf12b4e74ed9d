"""How ranks are arranged: every product of degrees up to 64 ranks."""

from itertools import combinations
from math import prod

import pytest

from engine.layout.mesh import AXES, Mesh, read_mesh

MESHES = [
    Mesh(0, world, pipeline, tensor, sequence)
    for world in range(1, 65)
    for pipeline in range(1, world + 1)
    for tensor in range(1, world // pipeline + 1)
    for sequence in range(1, world // (pipeline * tensor) + 1)
    if world % (pipeline * tensor * sequence) == 0
]


def places(mesh: Mesh) -> list[tuple[int, ...]]:
    """Of every rank: its number along each axis."""
    return [
        tuple(getattr(mesh._replace(rank=rank), f"{axis}_rank") for axis in AXES) for rank in range(mesh.world_size)
    ]


def test_every_place_has_one_rank_and_tensor_neighbours_are_nearest():
    for mesh in MESHES:
        assert mesh.pipeline * mesh.data * mesh.sequence * mesh.tensor == mesh.world_size
        found = places(mesh)
        assert found == sorted(set(found))  # from the slowest axis to the fastest, as DeepSpeed's topology counts
        assert found[-1] == tuple(getattr(mesh, axis) - 1 for axis in AXES)


def test_groups_hold_the_ranks_that_differ_along_their_axes_only():
    for mesh in MESHES:
        of_rank = places(mesh)
        for count in range(1, len(AXES) + 1):
            for axes in combinations(AXES, count):
                groups = mesh.groups_along(*axes)
                assert sorted(rank for ranks in groups for rank in ranks) == list(range(mesh.world_size))
                for ranks in groups:
                    assert ranks == sorted(ranks)
                    assert len(ranks) == prod(getattr(mesh, axis) for axis in axes)
                    outside = [i for i, axis in enumerate(AXES) if axis not in axes]
                    assert len({tuple(of_rank[rank][i] for i in outside) for rank in ranks}) == 1


def test_the_columns_of_a_sequence_group_are_the_row_once():
    for mesh in MESHES:
        (ranks, *_) = mesh.groups_along("sequence")
        columns = [mesh._replace(rank=rank).columns(4 * mesh.sequence) for rank in ranks]
        assert [i for part in columns for i in range(4 * mesh.sequence)[part]] == list(range(4 * mesh.sequence))


def test_every_token_counts_once():
    for mesh in MESHES:
        counting = [rank for rank in range(mesh.world_size) if mesh._replace(rank=rank).counts]
        assert len(counting) == mesh.data * mesh.sequence
        assert len(
            {mesh._replace(rank=rank).data_rank * 64 + mesh._replace(rank=rank).sequence_rank for rank in counting}
        ) == len(counting)


def degrees_of(mesh: Mesh) -> tuple[int, ...]:
    return mesh.pipeline, mesh.data, mesh.sequence, mesh.tensor


@pytest.mark.parametrize(
    ("config", "flags", "expected"),
    [
        ({}, {}, (1, 8, 1, 1)),
        ({}, {"tensor": 2}, (1, 4, 1, 2)),
        ({}, {"pipeline": 2, "tensor": 2, "sequence": 2}, (2, 1, 2, 2)),
        ({"pipeline": {}}, {}, (8, 1, 1, 1)),
        ({"pipeline": {}}, {"pipeline": 2}, (2, 4, 1, 1)),
        ({"pipeline": {"stages": "auto"}, "tensor_parallel": {"autotp_size": 2}}, {}, (4, 1, 1, 2)),
        ({"pipeline": {"stages": 2}, "tensor_parallel": {"autotp_size": "auto"}}, {}, (2, 1, 1, 4)),
        ({"sequence_parallel_size": "auto"}, {"tensor": 2}, (1, 1, 4, 2)),
        ({"tensor_parallel": {"autotp_size": 2}}, {"tensor": 2}, (1, 4, 1, 2)),
    ],
)
def test_json_and_flags_say_the_degrees(config, flags, expected):
    mesh, problems = read_mesh(config, 0, 8, flags)
    assert not problems
    assert degrees_of(mesh) == expected
    assert read_mesh(config, 0, 8, {}) == (mesh, [])  # all of it stands in the JSON now


@pytest.mark.parametrize(("degree", "said"), [(2, "8 ranks, sequence 2, by keys"), (1, "8 ranks")])
def test_keys_are_exchanged_where_a_row_is_shared(degree, said):
    config = {"sequence_parallel_size": "auto", "sequence_parallel_exchange": "keys"}
    mesh, _ = read_mesh(config, 0, 8, {"sequence": degree})
    assert mesh.exchange == ("keys" if degree > 1 else "heads")
    assert str(mesh) == said


@pytest.mark.parametrize(
    ("config", "flags", "sentence"),
    [
        (
            {"pipeline": {}, "tensor_parallel": {"autotp_size": "auto"}},
            {},
            'pipeline.stages and tensor_parallel.autotp_size are both "auto": start with --pipeline_stages N and --tensor N',
        ),
        (
            {"tensor_parallel": {"autotp_size": 2}},
            {"tensor": 4},
            'tensor_parallel.autotp_size is 2 but --tensor is 4: make them equal or "auto"',
        ),
        ({}, {"sequence": 0}, "--sequence must be a whole number above 0, got 0"),
        (
            {},
            {"tensor": 3},
            "tensor_parallel.autotp_size 3 does not divide the 8 ranks of this launch: use 2 or 4 or 8",
        ),
        (
            {"pipeline": {"stages": 4}, "sequence_parallel_size": 2},
            {"tensor": 2},
            "pipeline.stages 4 x tensor_parallel.autotp_size 2 x sequence_parallel_size 2 = 16 does not divide the 8 ranks of "
            "this launch: start a multiple of 16 ranks, or use smaller degrees",
        ),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(config, flags, sentence):
    assert read_mesh(config, 0, 8, flags)[1] == [sentence]
