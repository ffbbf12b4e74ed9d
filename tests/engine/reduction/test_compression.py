"""Compressed gradients: nothing is lost but late, all ranks agree to the bit, and fewer bytes are sent, as computed."""

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.reduction.compressors import OneBit, PowerSGD, decode, encode
from tests.engine.reduction.reductions import COMPRESSED, MIN_ELEMENTS, SHAPES, moved, reduced
from tests.properties import examples

WARMUP, STEPS = 3, 150
POWERSGD = {"method": "powersgd", "rank": 2, "warmup_steps": WARMUP, "min_elements": MIN_ELEMENTS}
ONEBIT = {"method": "onebit", "warmup_steps": WARMUP, "min_elements": MIN_ELEMENTS}
SECTIONS = {"powersgd": POWERSGD, "onebit": ONEBIT, "all in warm-up": ONEBIT | {"warmup_steps": 1000}}
METHODS = ["powersgd", "onebit"]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 4), st.floats(1e-12, 1e12), st.integers(0, 2**32))
@examples(200)
def test_a_rank_as_large_as_the_matrix_is_exact(rows, columns, more, size, seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = size * torch.randn(rows, columns, generator=generator)
    compressor = PowerSGD(min(rows, columns) + more * (rows <= columns))
    ((_, sent, mean),) = compressor.reduce({"m": matrix}, [], lambda tensors: None)
    torch.testing.assert_close(mean, matrix, rtol=0, atol=1e-4 * float(matrix.abs().max()))
    assert torch.equal(sent, mean)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 5))
def test_power_iteration_finds_the_rank_of_a_matrix_that_stays(rows, columns, seed):
    """A matrix of rank 1 is exact from the first step on, also after a step in which it was zero."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.outer(torch.randn(rows, generator=generator), torch.randn(columns, generator=generator))
    compressor = PowerSGD(1)
    for factor in (1.0, 0.0, 1.0, -2.0):
        ((_, _, mean),) = compressor.reduce({"m": factor * matrix}, [], lambda tensors: None)
    torch.testing.assert_close(mean, -2 * matrix, rtol=1e-4, atol=1e-6)


def test_steps_on_the_same_matrix_find_its_best_approximation():
    """Each step starts from the last one's result; a step by itself stays far from the optimum of Eckart and Young."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 20, generator=generator)).Q for n in (30, 40))
    matrix = left * 0.8 ** torch.arange(20) @ right.T
    compressor, errors = PowerSGD(3), []
    for _ in range(60):
        ((_, _, mean),) = compressor.reduce({"m": matrix}, [], lambda tensors: None)
        errors.append(float((matrix - mean).norm()))
    best = float(torch.linalg.svdvals(matrix)[3:].norm())
    assert errors[0] > 1.05 * best
    assert errors[-1] < 1.001 * best


def test_a_result_that_overflows_after_the_first_all_reduce_leaves_no_trace():
    up, first, second = torch.ones(4), torch.eye(6)[0], torch.eye(6)[1]
    compressor = PowerSGD(1)
    list(compressor.reduce({"m": torch.outer(up, first)}, [], lambda tensors: None))
    before = compressor.q["m"].clone()
    assert compressor.reduce({"m": torch.outer(up, first + 1e25 * second)}, [], lambda tensors: None) is None
    assert torch.equal(compressor.q["m"], before)


@given(st.lists(st.integers(0, 32), min_size=1, max_size=5), st.integers(0, 2**32))
@examples(100)
def test_a_block_is_its_signs_times_its_mean_absolute_value(filled, seed):
    blocks = torch.randn(len(filled), 32, generator=torch.Generator().manual_seed(seed)) ** 3
    blocks[0, 1] = 0.0
    for block, count in zip(blocks, filled, strict=True):
        block[count:] = 0.0
    message = encode(blocks, torch.tensor(filled))
    assert message.shape == (len(filled), 32 // 8 + 4)
    for block, result, count in zip(blocks, decode(message, torch.tensor(filled)), filled, strict=True):
        scale = block.abs().sum() / max(count, 1)
        torch.testing.assert_close(result[:count].abs(), scale.expand(count))
        assert torch.equal(torch.signbit(result[:count]), torch.signbit(block[:count]))
        assert not result[count:].any()
        # what makes error feedback converge: less is left than there was (Karimireddy et al. 2019, assumption A)
        assert (block - result).norm() <= block.norm()


@pytest.fixture(scope="module")
def state_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request, state_folder, on_ranks):
    return on_ranks(request.param, reduced, str(state_folder), SECTIONS, STEPS)


@pytest.mark.parametrize("name", SECTIONS)
def test_all_ranks_hold_the_same_gradients(ranks, name):
    for rank in ranks:
        assert rank[name]["digests"] == ranks[0][name]["digests"]
        assert len(set(rank[name]["digests"])) == STEPS


@pytest.mark.parametrize("name", SECTIONS)
def test_updates_and_residuals_add_up_to_the_true_gradients(ranks, name):
    """The part that is owed is no trifle, so the sums would not agree without it."""
    for rank in ranks:
        assert max(rank[name]["lost"].values()) < 1e-5
        assert (rank[name]["owed"] > 0.01) == (name != "all in warm-up")


@pytest.mark.parametrize("method", METHODS)
def test_residuals_of_the_ranks_do_not_drift_apart(ranks, method):
    """What a rank owes beyond the mean goes down with every step, too; else it would grow with the root of the steps."""
    for rank in ranks:
        assert rank[method]["apart"] < 1.7


@pytest.mark.parametrize("name", SECTIONS)
def test_a_step_that_is_not_finite_leaves_no_trace(ranks, name):
    """NaN, infinity, or a finite value whose norm overflows, on one rank; then the restored state is the live one."""
    for rank in ranks:
        if name != "all in warm-up":
            assert rank[name]["all_nan"] == [True, True, True]
        assert rank[name]["untouched"] == [True, True, True]
        assert rank[name]["continued"][0] == rank[name]["continued"][1] == ranks[0][name]["continued"][0]


def expected_bytes(method: str, ranks: int) -> tuple[int, float]:
    """Payload and ring bytes of one reduction, from the shapes alone."""
    plain = 4 * sum(prod(shape) for name, shape in SHAPES.items() if name not in COMPRESSED)
    shapes = [(SHAPES[name][0], prod(SHAPES[name][1:])) for name in COMPRESSED]
    all_reduce = 2 * (ranks - 1) / ranks
    if method == "powersgd":
        payload = plain + 4 * POWERSGD["rank"] * sum(rows + columns for rows, columns in shapes)
        return payload, payload * all_reduce
    blocks = sum(-(-rows * columns // OneBit.BLOCK) for rows, columns in shapes)
    message = -(-blocks // ranks) * ranks * (OneBit.BLOCK // 8 + 4)
    return plain + message + message // ranks, (plain + message) * all_reduce


@pytest.mark.parametrize("method", METHODS)
def test_bytes_on_the_wire_are_those_of_the_formula(ranks, method):
    elements = sum(map(prod, SHAPES.values()))
    payload, ring = expected_bytes(method, len(ranks))
    for rank in ranks:
        assert rank[method]["residuals"] == sorted(COMPRESSED)
        assert rank[method]["wire_bytes"] == [4 * elements] * WARMUP + [payload] * (STEPS - WARMUP)
        assert rank[method]["ring_bytes"] == pytest.approx(ring)
        assert rank[method]["counted_outside"]
        assert rank["all in warm-up"]["wire_bytes"] == [4 * elements] * STEPS


@pytest.fixture(scope="module")
def on_others(state_folder, ranks, on_ranks):
    """What 2 or 3 ranks left, on one rank, what that left on two again, and with other settings."""
    world = f"world{len(ranks)}"
    first = [(f"{name}/{world}", SECTIONS[name], f"{name}/{world}-one") for name in METHODS]
    one = on_ranks(1, moved, str(state_folder), first)
    other_rank, larger_only = POWERSGD | {"rank": 3}, ONEBIT | {"min_elements": 2000}
    second = [(f"{name}/{world}-one/restored", SECTIONS[name], f"{name}/{world}-back") for name in METHODS]
    second += [(f"{name}/{world}-one", SECTIONS[name], f"{name}/{world}-empty") for name in METHODS]
    second += [
        (f"powersgd/{world}", ONEBIT, f"powersgd/{world}-onebit"),
        (f"onebit/{world}", POWERSGD, f"onebit/{world}-powersgd"),
        (f"powersgd/{world}", other_rank, f"powersgd/{world}-rank"),
        (f"onebit/{world}", larger_only, f"onebit/{world}-larger"),
    ]
    return one[0], on_ranks(2, moved, str(state_folder), second)


def test_another_number_of_ranks_or_another_method_keeps_the_total(on_others):
    one, two = on_others
    for result in [*one, *two[0], *two[1]]:
        assert result["total_kept"]
        assert result["lost"] < 1e-5 * result["scale"]
    for a, b in zip(*two, strict=True):
        assert a["digest"] == b["digest"]
    assert all(result["owed_something"] for result in [*one, *two[0][:2], *two[0][4:]])
    assert not any(result["owed_something"] for result in two[0][2:4])


def test_one_rank_pays_what_is_owed_with_the_first_gradient(on_others):
    one, two = on_others
    assert [result["residuals"] for result in one] == [[], []]
    assert [result["residuals"] for result in two[0][:-1]] == [sorted(COMPRESSED)] * 7
    assert two[0][-1]["residuals"] == sorted(name for name in COMPRESSED if prod(SHAPES[name]) >= 2000)
