"""A run that stopped and continued is the run that never stopped: in every stage, and from any stage and ranks to any."""

import numpy as np
import pytest

from tests.engine.programs import BF16, continued, interrupted, moved, prepare, zero
from tests.launch import run_ranks

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
READ_AHEAD = {"data.num_workers": "2", "data.prefetch_batches": "8"}
LION = {"optimizer.name": "lion", "optimizer.lr": "1e-3"}
CONFIGS = {
    **{f"zero{stage}": (zero(stage), {}) for stage in range(4)},
    "zero0-autocast": (zero(0, torch_autocast={"enabled": True, "dtype": "bfloat16"}), {}),
    **{f"zero{stage}-bf16": (zero(stage, **BF16), {}) for stage in (1, 2, 3)},
    "zero2-offload": (zero(2, zero=OFFLOAD), {}),
    "zero3-offload": (zero(3, zero=OFFLOAD | {"offload_param": {"device": "cpu"}}), {}),
    "zero1-read-ahead": (zero(1), READ_AHEAD),
    "zero0-muon": (zero(0), {"optimizer.name": "muon"}),
    **{f"zero{stage}-lion": (zero(stage), LION) for stage in (0, 2, 3)},
    "pipeline": (zero(1, pipeline={"stages": "auto"}), {}),
    "pipeline-bf16": (zero(1, pipeline={"stages": "auto"}, **BF16), {}),
}
TENSOR = {  # not on one rank
    "tensor2-zero0": (zero(0, tensor_parallel={"autotp_size": 2}), {}),
    "tensor2-zero1-bf16": (zero(1, tensor_parallel={"autotp_size": 2}, **BF16), {}),
    "tensor2-zero2": (zero(2, tensor_parallel={"autotp_size": 2}), {}),
    "tensor2-zero3": (zero(3, tensor_parallel={"autotp_size": 2}), {}),
}
ON_TWO = CONFIGS | TENSOR
ON_FOUR = {
    "pipeline4": (zero(1, pipeline={"stages": 4}), {}),
    "pipeline2-data2": (zero(1, pipeline={"stages": 2, "partition": "uniform"}), {}),
    "sequence2-data2": (zero(3, sequence_parallel_size=2), {}),
    "sequence4": (zero(0, sequence_parallel_size=4), {}),
    **{name.replace("2", "2-data2", 1): TENSOR[name] for name in ("tensor2-zero0", "tensor2-zero2", "tensor2-zero3")},
}
STAGES = ["zero0", "zero1", "zero2", "zero3", "zero3-offload"]
TO_ONE = [(source, target) for source in STAGES for target in STAGES if source != target]
TO_ONE += [("zero1-bf16", "zero3-bf16"), ("zero3-bf16", "zero1-bf16"), ("zero2-bf16", "zero0-autocast")]
TO_ONE += [("zero0-lion", "zero2-lion"), ("zero2-lion", "zero3-lion"), ("zero3-lion", "zero0-lion")]
TO_ONE += [("pipeline", "zero0"), ("pipeline", "zero3-offload"), ("pipeline-bf16", "zero2-bf16")]
TO_ONE += [("tensor2-zero0", "zero3"), ("tensor2-zero2", "zero0"), ("tensor2-zero3", "zero1")]
TO_ONE += [("tensor2-zero1-bf16", "zero2-bf16")]
TO_FOUR = [("zero3", "pipeline4"), ("zero2-offload", "pipeline2-data2"), ("pipeline", "pipeline4")]
TO_FOUR += [("pipeline", "pipeline2-data2"), ("tensor2-zero3", "sequence4"), ("zero0", "sequence2-data2")]
TO_FOUR += [
    ("zero0", "tensor2-data2-zero3"),
    ("pipeline", "tensor2-data2-zero2"),
    ("tensor2-zero2", "tensor2-data2-zero0"),
]
FROM_FOUR = [("pipeline4", "zero3"), ("pipeline4", "pipeline"), ("pipeline2-data2", "zero0")]
FROM_FOUR += [("pipeline2-data2", "pipeline"), ("sequence2-data2", "pipeline"), ("sequence2-data2", "zero1")]
FROM_FOUR += [("tensor2-data2-zero3", "tensor2-zero0"), ("tensor2-data2-zero2", "tensor2-zero3")]
FROM_FOUR += [("tensor2-data2-zero2", "pipeline"), ("pipeline4", "tensor2-zero2")]
FROM_FOUR += [("sequence2-data2", "tensor2-zero3")]
MOVES = [*(("to one", *pair) for pair in TO_ONE), *(("to four", *pair) for pair in TO_FOUR)]
MOVES += [("from four", *pair) for pair in FROM_FOUR]


def tolerance(*names: str) -> float:
    """float32 to rounding; bf16 rounds each rank's sum by more; Muon's iteration alone is in bf16."""
    loosest = {"bf16": 0.02, "autocast": 0.02, "muon": 1e-4}
    return max((bound for word, bound in loosest.items() if any(word in name for name in names)), default=1e-5)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    return str(folder), *prepare(folder)


@pytest.fixture(scope="module")
def runs(setting):
    """On 2 ranks: 8 steps at once, and 4 + 4 with a checkpoint between; then the checkpoint on 1 rank, then on 2 again."""
    two = run_ranks(interrupted, 2, *setting, ON_TWO, timeout=500)
    elsewhere = {"to one": run_ranks(moved, 1, *setting, TO_ONE, CONFIGS, 4, timeout=500)}
    elsewhere["to four"] = run_ranks(moved, 4, *setting, TO_FOUR, ON_FOUR, 4, timeout=500)
    one = run_ranks(continued, 1, *setting, CONFIGS, 2, timeout=500)
    again = run_ranks(continued, 2, *setting, CONFIGS, 2, timeout=500)
    return two, one, again, elsewhere


@pytest.fixture(scope="module")
def runs_on_four(setting):
    chosen = {name: ON_FOUR[name] for name, _ in FROM_FOUR}
    four = run_ranks(interrupted, 4, *setting, chosen, timeout=500)
    return four, {"from four": run_ranks(moved, 2, *setting, FROM_FOUR, ON_TWO, 4, timeout=500)}


def values(history) -> np.ndarray:
    return np.array([(step["loss"], step["objective"], step["grad_norm"]) for step in history])


def rows(ranks, name, key, steps) -> list:
    """The rows of each step over all ranks, as a multiset; the ranks of one pipeline have the same."""
    takers = ranks[:1] if name.startswith("pipeline") else ranks
    return [sorted(row for rank in takers for row in rank[name][key][i]["rows"]) for i in steps]


@pytest.mark.parametrize("name", ON_TWO)
def test_same_layout_is_exact_to_the_bit(runs, name):
    for rank in runs[0]:
        result = rank[name]
        assert [s["step"] for s in result["history"]] == list(range(1, 9))
        np.testing.assert_array_equal(values(result["history"]), values(result["expected"]))
        assert [s["rows"] for s in result["history"]] == [s["rows"] for s in result["expected"]]


@pytest.mark.parametrize("name", CONFIGS)
def test_other_ranks_continue_the_same_samples(runs, name):
    two, one, again, _ = runs
    expected = rows(two, name, "expected", range(4, 8))
    assert rows(one, name, "history", range(2)) == expected[:2]
    assert rows(again, name, "history", range(2)) == expected[2:]


@pytest.mark.parametrize("name", CONFIGS)
def test_other_ranks_compute_the_same(runs, name):
    two, one, again, _ = runs
    expected = values(two[0][name]["expected"])
    np.testing.assert_allclose(values(one[0][name]["history"]), expected[4:6], rtol=tolerance(name))
    np.testing.assert_allclose(values(again[0][name]["history"]), expected[6:8], rtol=tolerance(name))
    if tolerance(name) == 1e-5:
        weights = whole([rank[name] for rank in again])
        for key, value in whole([rank[name] for rank in two]).items():
            np.testing.assert_allclose(weights[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_groups_keep_their_own_weight_decay(runs, name):
    for run in runs[1:3]:
        decays = [decay for decay, _ in run[0][name]["groups"]]
        assert decays == ([0.1, 0.1, 0.0] if name.endswith("-muon") else [0.1, 0.0])


@pytest.mark.parametrize("move", MOVES, ids=" ".join)
def test_any_layout_continues_in_any_other_on_other_ranks(runs, runs_on_four, move):
    """The curve and the weights of the run that never stopped and never moved."""
    where, source, target = move
    begun, moves = runs_on_four if where == "from four" else (runs[0], runs[3])
    went = [rank[source, target] for rank in moves[where]]
    assert [step["step"] for step in went[0]["history"]] == [5, 6, 7, 8]
    expected = begun[0][source]["expected"][4:]
    np.testing.assert_allclose(values(went[0]["history"]), values(expected), rtol=tolerance(source, target))
    if tolerance(source, target) == 1e-5:
        weights = whole(went)
        for key, value in whole([rank[source] for rank in begun]).items():
            np.testing.assert_allclose(weights[key], value, rtol=1e-5, atol=1e-5)


def whole(results: list[dict]) -> dict[str, np.ndarray]:
    """The weights of all ranks, of which each has its own layers in a pipeline."""
    return {key: value for result in results for key, value in result["weights"].items()}
