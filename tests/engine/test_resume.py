"""A run that stopped and continued is the run that never stopped: in every stage, and from any stage and ranks to any."""

import numpy as np
import pytest

from tests.engine.programs import BF16, continued, interrupted, moved, prepare, zero
from tests.launch import run_ranks

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
READ_AHEAD = {"data.num_workers": "2", "data.prefetch_batches": "8"}
CONFIGS = {
    **{f"zero{stage}": (zero(stage), {}) for stage in range(4)},
    "zero0-autocast": (zero(0, torch_autocast={"enabled": True, "dtype": "bfloat16"}), {}),
    **{f"zero{stage}-bf16": (zero(stage, **BF16), {}) for stage in (1, 2, 3)},
    "zero2-offload": (zero(2, zero=OFFLOAD), {}),
    "zero3-offload": (zero(3, zero=OFFLOAD | {"offload_param": {"device": "cpu"}}), {}),
    "zero1-read-ahead": (zero(1), READ_AHEAD),
}
STAGES = ["zero0", "zero1", "zero2", "zero3", "zero3-offload"]
PAIRS = [(source, target) for source in STAGES for target in STAGES if source != target]
PAIRS += [("zero1-bf16", "zero3-bf16"), ("zero3-bf16", "zero1-bf16"), ("zero2-bf16", "zero0-autocast")]
FLOAT32 = [name for name in CONFIGS if "bf16" not in name and "autocast" not in name]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """On 2 ranks: 8 steps at once, and 4 + 4 with a checkpoint between; then the checkpoint on 1 rank, then on 2 again."""
    folder = tmp_path_factory.mktemp("resume")
    arguments = str(folder), *prepare(folder), CONFIGS
    two = run_ranks(interrupted, 2, *arguments, timeout=400)
    elsewhere = run_ranks(moved, 1, *arguments[:-1], PAIRS, CONFIGS, 4, timeout=400)
    one = run_ranks(continued, 1, *arguments, 2, timeout=400)
    again = run_ranks(continued, 2, *arguments, 2, timeout=400)
    return two, one, again, elsewhere[0]


def values(history) -> np.ndarray:
    return np.array([(step["loss"], step["objective"], step["grad_norm"]) for step in history])


def rows(ranks, name, key, steps) -> list:
    """The rows of each step over all ranks, as a multiset."""
    return [sorted(row for rank in ranks for row in rank[name][key][i]["rows"]) for i in steps]


@pytest.mark.parametrize("name", CONFIGS)
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
    """float32 to rounding; bf16 rounds each rank's sum, so 2 ranks differ from 1 by that."""
    two, one, again, _ = runs
    tolerance = 1e-5 if name in FLOAT32 else 0.02
    expected = values(two[0][name]["expected"])
    np.testing.assert_allclose(values(one[0][name]["history"]), expected[4:6], rtol=tolerance)
    np.testing.assert_allclose(values(again[0][name]["history"]), expected[6:8], rtol=tolerance)
    if name in FLOAT32:
        for key, value in two[0][name]["weights"].items():
            np.testing.assert_allclose(again[0][name]["weights"][key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_groups_keep_their_own_weight_decay(runs, name):
    for run in runs[1:3]:
        decays = [decay for decay, _ in run[0][name]["groups"]]
        assert decays == [0.1, 0.0]


@pytest.mark.parametrize("pair", PAIRS, ids="->".join)
def test_any_stage_continues_in_any_other_on_other_ranks(runs, pair):
    """From 2 ranks in one stage to 1 rank in another: the curve of the run that never stopped and never moved."""
    source, target = pair
    tolerance = 1e-5 if {source, target} <= set(FLOAT32) else 0.02
    moved_run, stayed = runs[3][pair], runs[0][0][source]
    assert [step["step"] for step in moved_run["history"]] == [5, 6, 7, 8]
    np.testing.assert_allclose(values(moved_run["history"]), values(stayed["expected"][4:]), rtol=tolerance)
    if tolerance == 1e-5:
        for key, value in stayed["weights"].items():
            np.testing.assert_allclose(moved_run["weights"][key], value, rtol=1e-5, atol=1e-5)
