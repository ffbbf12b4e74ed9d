"""The plan of reads: from any division of a model's states to any other, all that is kept, and little more than once."""

import itertools
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.checkpoint.division import Division, dealt, slice_at
from engine.checkpoint.foreseen import foreseen_division
from engine.checkpoint.manifest import StateLayout
from engine.layout.pipeline import pipeline_bounds
from engine.layout.slices import cut_dimensions, slice_of
from model.config import ModelConfig
from training.sections import OptimizerConfig

ADAMW = OptimizerConfig(lr=1e-3)
TINY = ModelConfig(
    vocab_size=11,
    hidden_size=6,
    intermediate_size=7,
    num_hidden_layers=3,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=2,
    attention_bias=True,
    qk_norm=True,
)
TIED = TINY.model_copy(update={"tie_word_embeddings": True, "position_embedding": "learned"})


def layout(stage: int, data: int, tensor: int = 1, pipeline: int = 1, model: ModelConfig = TINY) -> StateLayout:
    bounds = tuple(pipeline_bounds(model, pipeline, "parameters", 64)) if pipeline > 1 else ()
    ranks = data * tensor * pipeline
    return StateLayout(zero_stage=stage, world_size=ranks, wrapper="", optimizer="", stage_bounds=bounds, tensor=tensor)


LAYOUTS = st.builds(layout, st.integers(0, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))


def numbered(division: Division) -> dict[str, np.ndarray]:
    """Whole parameters in which every element has a number of its own, from 1."""
    first = itertools.accumulate((prod(shape) for shape in division.shapes.values()), initial=1)
    return {
        name: np.arange(start, start + prod(shape)).reshape(shape)
        for (name, shape), start in zip(division.shapes.items(), first, strict=False)
    }


def vectors_of(division: Division, whole: dict[str, np.ndarray], part: int) -> list[list[np.ndarray]]:
    """By data rank and group, as DeepSpeed divides the parameters of a part; 0 in gaps."""
    of_part = division.parts[part]
    groups: dict[int, list[np.ndarray]] = {}
    for name in of_part.shapes:
        piece = slice_of(
            torch.from_numpy(whole[name]), division.dimensions[name], part % division.tensor, division.tensor
        )
        groups.setdefault(of_part.places[name][0], []).append(piece.numpy().flatten())
    ranks, divided = of_part.ranks, []
    for number, tensors in groups.items():
        if of_part.zero_stage == 0:
            divided.append(tensors * ranks)
        elif of_part.zero_stage == 3:
            shares = [np.pad(t, (0, -len(t) % ranks)).reshape(ranks, -1) for t in tensors]
            divided.append(list(np.concatenate(shares, axis=1)))
        else:
            flat = np.concatenate(tensors)
            divided.append(list(np.pad(flat, (0, of_part.sizes[number] * ranks - len(flat))).reshape(ranks, -1)))
    return [list(of_rank) for of_rank in zip(*divided, strict=True)]


def carry_out(source: Division, target: Division, whole: dict[str, np.ndarray], rank: int, found: list) -> int:
    """Read what a rank of the target keeps into `found`, its vectors by group; returns how many elements were read."""
    files = [vectors_of(source, whole, part) for part in range(len(source.parts))]
    (others, tensor_rank), ranks = divmod(rank, target.tensor), target.parts[0].ranks
    part, count = target.parts[others // ranks * target.tensor + tensor_rank], 0
    for name, piece, elements in target.kept(rank):
        got = np.zeros(prod(part.shapes[name]), np.int64)
        for read in source.reads(name, piece, elements):
            vector = files[read.part][read.rank][read.group]
            for row in range(read.box.rows):
                begin = read.box.target + row * read.box.target_stride
                assert not got[begin : begin + read.box.width].any(), "read twice"
                start = read.box.source + row * read.box.source_stride
                got[begin : begin + read.box.width] = vector[start : start + read.box.width]
                count += read.box.width
        for stretch in part.stretches(name, elements.start, elements.stop):
            assert stretch.rank == others % ranks or part.zero_stage == 0
            place = found[stretch.group][stretch.offset : stretch.offset + stretch.length]
            place[:] = got[stretch.first : stretch.first + stretch.length]
    return count


@given(LAYOUTS, LAYOUTS, st.sampled_from([TINY, TIED]))
def test_every_rank_gets_what_it_keeps_and_reads_it_once(source_layout, target_layout, model):
    """Carried out on numbers, against the definition of the ZeRO stages."""
    source, target = (foreseen_division(model, ADAMW, layout) for layout in (source_layout, target_layout))
    assert source.shapes == target.shapes
    whole, data = numbered(source), target.parts[0].ranks
    for part, of_part in enumerate(target.parts):
        expected = vectors_of(target, whole, part)
        replicas = [np.zeros_like(vector) for vector in expected[0]]
        for data_rank in range(data):
            rank = (part // target.tensor * data + data_rank) * target.tensor + part % target.tensor
            found = replicas if of_part.zero_stage == 0 else [np.zeros_like(vector) for vector in expected[data_rank]]
            kept = sum(len(elements) for _, _, elements in target.kept(rank))
            assert carry_out(source, target, whole, rank, found) == kept
            if of_part.zero_stage:
                for ours, theirs in zip(found, expected[data_rank], strict=True):
                    np.testing.assert_array_equal(ours, theirs)
        if of_part.zero_stage == 0:
            for ours, theirs in zip(replicas, expected[0], strict=True):
                np.testing.assert_array_equal(ours, theirs)


REAL = ModelConfig(
    vocab_size=512, hidden_size=128, intermediate_size=344, num_hidden_layers=8, num_attention_heads=8
)  # the shares of embedding, matrices and norms are those of a small real model
SHAPES = [
    (stage, ranks // tensor // pipeline, tensor, pipeline)
    for ranks in (1, 2, 4, 8)
    for tensor in (1, 2, 4, 8)
    for pipeline in (1, 2, 4, 8)
    if ranks % (tensor * pipeline) == 0
    for stage in ((0, 1, 2, 3) if pipeline == 1 else (1,))
]


@pytest.fixture(scope="module")
def divisions() -> dict[tuple, Division]:
    return {shape: foreseen_division(REAL, ADAMW, layout(*shape, model=REAL)) for shape in SHAPES}


@pytest.mark.parametrize("target", SHAPES, ids=str)
def test_up_to_8_ranks_read_at_most_one_and_a_half_checkpoints(divisions, target):
    """From a sample of layouts, every axis and stage among them."""
    to, whole = divisions[target], REAL.num_parameters()
    sources = SHAPES[SHAPES.index(target) % 3 :: 3]
    for source in sources:
        counts = [elements_read(divisions[source], to, rank) for rank in range(prod(target[1:]))]
        assert whole <= sum(counts) <= 1.5 * whole


def elements_read(source: Division, target: Division, rank: int) -> int:
    return sum(
        read.box.rows * read.box.width
        for name, piece, elements in target.kept(rank)
        for read in source.reads(name, piece, elements)
    )


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5), st.sampled_from([None, 0, 1]), st.data())
def test_a_slice_is_the_tensor_that_tensor_parallelism_cuts(rows, columns, ranks, dimension, data):
    whole = torch.arange(rows * columns).view(rows, columns)
    rank = data.draw(st.integers(0, ranks - 1))
    piece = slice_at((rows, columns), dimension, rank, ranks)
    seen = whole.view(piece.rows, piece.width)[:, piece.low : piece.high]
    assert seen.flatten().tolist() == slice_of(whole, dimension, rank, ranks).flatten().tolist()


@given(st.dictionaries(st.text(max_size=2), st.integers(0, 50)), st.integers(1, 8))
def test_work_is_dealt_evenly(sizes, replicas):
    readers = dealt(sizes, replicas)
    assert readers.keys() == sizes.keys()
    loads = [sum(size for name, size in sizes.items() if readers[name] == rank) for rank in range(replicas)]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)


@pytest.mark.parametrize("model", [TINY, TIED], ids=["plain", "tied"])
def test_a_foreseen_division_has_every_parameter(model):
    division = foreseen_division(model, ADAMW, layout(3, 2, 3, 3))
    assert division.shapes.keys() == cut_dimensions(model).keys() - ({"lm_head.weight"} if model is TIED else set())
    assert sum(map(prod, division.shapes.values())) == model.num_parameters()
