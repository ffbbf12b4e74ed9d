"""A run that stopped and continued is the run that never stopped: in every stage, and from any stage and ranks to any."""

import shutil

import numpy as np
import pytest

from tests.engine.kept import kept
from tests.engine.programs import BF16, DEEP, continued, interrupted, moved, prepare, zero

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
READ_AHEAD = {"data.num_workers": "2", "data.prefetch_batches": "8"}
LION = {"optimizer.name": "lion", "optimizer.lr": "1e-3"}
MUON, NORMUON = {"optimizer.name": "muon"}, {"optimizer.name": "normuon"}
CONFIGS = {
    **{f"zero{stage}": (zero(stage), {}) for stage in range(4)},
    "zero0-autocast": (zero(0, torch_autocast={"enabled": True, "dtype": "bfloat16"}), {}),
    **{f"zero{stage}-bf16": (zero(stage, **BF16), {}) for stage in (1, 2, 3)},
    "zero2-offload": (zero(2, zero=OFFLOAD), {}),
    "zero3-offload": (zero(3, zero=OFFLOAD | {"offload_param": {"device": "cpu"}}), {}),
    "zero1-read-ahead": (zero(1), READ_AHEAD),
    "zero0-muon": (zero(0), MUON),
    "zero1-bf16-muon": (zero(1, **BF16), MUON),
    "zero3-muon": (zero(3), MUON),
    "pipeline-muon": (zero(1, pipeline={"stages": "auto"}), MUON),
    "zero2-normuon": (zero(2), NORMUON),
    **{f"zero{stage}-lion": (zero(stage), LION) for stage in (0, 2, 3)},
    "pipeline": (zero(1, pipeline={"stages": "auto"}), {}),
    "pipeline-bf16": (zero(1, pipeline={"stages": "auto"}, **BF16), {}),
}
TENSOR = {  # not on one rank
    "tensor2-zero0": (zero(0, tensor_parallel={"autotp_size": 2}), {}),
    "tensor2-zero1-bf16": (zero(1, tensor_parallel={"autotp_size": 2}, **BF16), {}),
    "tensor2-zero2": (zero(2, tensor_parallel={"autotp_size": 2}), {}),
    "tensor2-zero3": (zero(3, tensor_parallel={"autotp_size": 2}), {}),
    "tensor2-zero3-normuon": (zero(3, tensor_parallel={"autotp_size": 2}), NORMUON),
}
KEYS = {"keys2": (zero(2, sequence_parallel_size=2, sequence_parallel_exchange="keys"), {})}
DEEPER = {f"{name}-deep": ((CONFIGS | TENSOR)[name][0], DEEP) for name in ("zero3", "pipeline", "tensor2-zero2")}
ON_TWO = CONFIGS | TENSOR | KEYS | DEEPER
ON_FOUR = {
    "pipeline4": (zero(1, pipeline={"stages": 4}), DEEP),
    "pipeline2-data2": (zero(1, pipeline={"stages": 2, "partition": "uniform"}), {}),
    "sequence2-data2": (zero(3, sequence_parallel_size=2), {}),
    "sequence4": (zero(0, sequence_parallel_size=4), {}),
    **{name.replace("2", "2-data2", 1): TENSOR[name] for name in ("tensor2-zero0", "tensor2-zero2", "tensor2-zero3")},
}
COMBINED = {
    "pipeline2-tensor2": (zero(1, pipeline={"stages": 2}, tensor_parallel={"autotp_size": 2}), {}),
    "pipeline2-rows2-tied": (
        zero(1, pipeline={"stages": 2}, tensor_parallel={"autotp_size": 2, "split_rows": True}),
        {"model.tie_word_embeddings": "true"},
    ),
    "pipeline2-sequence2": (zero(1, pipeline={"stages": 2}, sequence_parallel_size=2), {}),
    "tensor2-sequence2-zero1": (zero(1, tensor_parallel={"autotp_size": 2}, sequence_parallel_size=2), {}),
    "tensor2-sequence2-zero3": (zero(3, tensor_parallel={"autotp_size": 2}, sequence_parallel_size=2), {}),
    "pipeline2-tensor2-muon": (zero(1, pipeline={"stages": 2}, tensor_parallel={"autotp_size": 2}), MUON),
}
ON_FOUR |= COMBINED
ON_EIGHT = {
    "pipeline2-tensor2-data2": COMBINED["pipeline2-tensor2"],
    "pipeline2-tensor2-sequence2": (COMBINED["pipeline2-tensor2"][0] | {"sequence_parallel_size": 2}, {}),
}
LAYOUTS = {2: ON_TWO, 4: ON_FOUR, 8: ON_EIGHT}
STAGES = ["zero0", "zero1", "zero2", "zero3", "zero3-offload"]
TO_ONE = [(source, target) for source in STAGES for target in STAGES if source != target]
TO_ONE += [("zero1-bf16", "zero3-bf16"), ("zero3-bf16", "zero1-bf16"), ("zero2-bf16", "zero0-autocast")]
TO_ONE += [("zero0-lion", "zero2-lion"), ("zero2-lion", "zero3-lion"), ("zero3-lion", "zero0-lion")]
TO_ONE += [("zero0-muon", "zero3-muon"), ("zero3-muon", "pipeline-muon"), ("pipeline-muon", "zero0-muon")]
TO_ONE += [("tensor2-zero3-normuon", "zero2-normuon")]
TO_ONE += [("pipeline", "zero0"), ("pipeline", "zero3-offload"), ("pipeline-bf16", "zero2-bf16")]
TO_ONE += [("tensor2-zero0", "zero3"), ("tensor2-zero2", "zero0"), ("tensor2-zero3", "zero1")]
TO_ONE += [("tensor2-zero1-bf16", "zero2-bf16")]
TO_FOUR = [("zero3-deep", "pipeline4"), ("zero2-offload", "pipeline2-data2"), ("pipeline-deep", "pipeline4")]
TO_FOUR += [("pipeline", "pipeline2-data2"), ("tensor2-zero3", "sequence4"), ("zero0", "sequence2-data2")]
TO_FOUR += [
    ("zero0", "tensor2-data2-zero3"),
    ("pipeline", "tensor2-data2-zero2"),
    ("tensor2-zero2", "tensor2-data2-zero0"),
]
FROM_FOUR = [("pipeline4", "zero3-deep"), ("pipeline4", "pipeline-deep"), ("pipeline2-data2", "zero0")]
FROM_FOUR += [("pipeline2-data2", "pipeline"), ("sequence2-data2", "pipeline"), ("sequence2-data2", "zero1")]
FROM_FOUR += [("tensor2-data2-zero3", "tensor2-zero0"), ("tensor2-data2-zero2", "tensor2-zero3")]
FROM_FOUR += [("tensor2-data2-zero2", "pipeline"), ("pipeline4", "tensor2-zero2-deep")]
FROM_FOUR += [("sequence2-data2", "tensor2-zero3")]
# every two of pipeline, tensor, sequence and data, from and to
TO_FOUR += [
    ("tensor2-zero2", "pipeline2-tensor2"),
    ("pipeline", "tensor2-sequence2-zero3"),
    ("zero1", "pipeline2-sequence2"),
    ("keys2", "tensor2-sequence2-zero1"),
    ("zero3-muon", "pipeline2-tensor2-muon"),
]
FROM_FOUR += [
    ("pipeline2-tensor2", "tensor2-zero3"),
    ("pipeline2-tensor2", "pipeline"),
    ("pipeline2-sequence2", "zero2"),
    ("pipeline2-tensor2-muon", "zero3-muon"),
]
FROM_FOUR += [("tensor2-sequence2-zero3", "zero1"), ("tensor2-sequence2-zero1", "tensor2-zero0")]
ON_AS_MANY = [("pipeline2-tensor2", "tensor2-sequence2-zero3"), ("tensor2-sequence2-zero1", "pipeline2-sequence2")]
ON_AS_MANY += [("pipeline2-sequence2", "pipeline2-data2"), ("pipeline2-data2", "pipeline2-tensor2")]
ON_AS_MANY += [("tensor2-sequence2-zero3", "tensor2-data2-zero2"), ("sequence2-data2", "pipeline2-tensor2")]
TO_EIGHT = [("pipeline2-tensor2", "pipeline2-tensor2-data2"), ("sequence2-data2", "pipeline2-tensor2-sequence2")]
MOVES = [*(("to one", *pair) for pair in TO_ONE), *(("to four", *pair) for pair in TO_FOUR)]
MOVES += [("from four", *pair) for pair in FROM_FOUR]
MOVES += [*(("on four", *pair) for pair in ON_AS_MANY), *(("to eight", *pair) for pair in TO_EIGHT)]
RANKS = {"to one": (2, 1), "to four": (2, 4), "from four": (4, 2), "on four": (4, 4), "to eight": (4, 8)}


def tolerance(*names: str) -> float:
    """float32 to rounding; bf16 rounds each rank's sum by more."""
    loosest = {"bf16": 0.02, "autocast": 0.02}
    return max((bound for word, bound in loosest.items() if any(word in name for name in names)), default=1e-5)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    return str(folder), *prepare(folder, blocks=2)


@pytest.fixture(scope="module")
def begun(setting, on_ranks):
    """By ranks and name: 8 steps of one engine, and of two with a checkpoint between; what each rank reports."""
    folder, *problem = setting

    @kept
    def run(ranks: int, name: str) -> list[dict]:
        chosen = {name: LAYOUTS[ranks][name]}
        return [rank[name] for rank in on_ranks(ranks, interrupted, f"{folder}/{ranks}", *problem, chosen)]

    return run


@pytest.fixture(scope="module")
def further(setting, begun, on_ranks):
    """By name: the checkpoint of 2 ranks continued on 1, and that one's on 2 again, by 2 steps each."""
    folder, *problem = setting

    @kept
    def run(name: str) -> tuple[list[dict], list[dict]]:
        begun(2, name)
        shutil.copytree(f"{folder}/2/{name}", f"{folder}/further/{name}")
        chosen = {name: CONFIGS[name]}
        one, again = (on_ranks(ranks, continued, f"{folder}/further", *problem, chosen, 2) for ranks in (1, 2))
        return [rank[name] for rank in one], [rank[name] for rank in again]

    return run


def values(history) -> np.ndarray:
    return np.array([(step["loss"], step["objective"], step["grad_norm"]) for step in history])


def rows(ranks, name, key, steps) -> list:
    """The rows of each step over all ranks, as a multiset; the ranks of one pipeline have the same."""
    takers = ranks[:1] if name.startswith("pipeline") else ranks
    return [sorted(row for rank in takers for row in rank[key][i]["rows"]) for i in steps]


@pytest.mark.parametrize(("ranks", "name"), [*((2, name) for name in ON_TWO), *((4, name) for name in ON_FOUR)])
def test_same_layout_is_exact_to_the_bit(begun, ranks, name):
    for result in begun(ranks, name):
        assert [s["step"] for s in result["history"]] == list(range(1, 9))
        np.testing.assert_array_equal(values(result["history"]), values(result["expected"]))
        assert [s["rows"] for s in result["history"]] == [s["rows"] for s in result["expected"]]


@pytest.mark.parametrize("name", CONFIGS)
def test_other_ranks_continue_the_same_samples(begun, further, name):
    one, again = further(name)
    expected = rows(begun(2, name), name, "expected", range(4, 8))
    assert rows(one, name, "history", range(2)) == expected[:2]
    assert rows(again, name, "history", range(2)) == expected[2:]


@pytest.mark.parametrize("name", CONFIGS)
def test_other_ranks_compute_the_same(begun, further, name):
    two, (one, again) = begun(2, name), further(name)
    expected = values(two[0]["expected"])
    np.testing.assert_allclose(values(one[0]["history"]), expected[4:6], rtol=tolerance(name))
    np.testing.assert_allclose(values(again[0]["history"]), expected[6:8], rtol=tolerance(name))
    if tolerance(name) == 1e-5:
        weights = whole(again)
        for key, value in whole(two).items():
            np.testing.assert_allclose(weights[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_groups_keep_their_own_weight_decay(further, name):
    for run in further(name):
        decays = [decay for decay, _ in run[0]["groups"]]
        in_pipeline = name.startswith("pipeline")
        assert decays == ([0.1, 0.1, 0.0] if name.endswith("muon") and not in_pipeline else [0.1, 0.0])


@pytest.mark.parametrize("move", MOVES, ids=" ".join)
def test_any_layout_continues_in_any_other_on_other_ranks(setting, begun, on_ranks, move):
    """The curve and the weights of the run that never stopped and never moved."""
    where, source, target = move
    before, after = RANKS[where]
    start = begun(before, source)
    arguments = f"{setting[0]}/{before}", *setting[1:], [(source, target)], LAYOUTS.get(after, ON_TWO), 4
    went = [rank[source, target] for rank in on_ranks(after, moved, *arguments)]
    assert [step["step"] for step in went[0]["history"]] == [5, 6, 7, 8]
    expected = start[0]["expected"][4:]
    np.testing.assert_allclose(values(went[0]["history"]), values(expected), rtol=tolerance(source, target))
    if tolerance(source, target) == 1e-5:
        weights = whole(went)
        for key, value in whole(start).items():
            np.testing.assert_allclose(weights[key], value, rtol=1e-5, atol=1e-5)


def whole(results: list[dict]) -> dict[str, np.ndarray]:
    """The weights of all ranks, of which each has its own layers in a pipeline."""
    return {key: value for result in results for key, value in result["weights"].items()}
