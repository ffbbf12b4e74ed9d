"""Training with compressed gradients: warm-up, resuming, what is refused, and what it does to the loss."""

from pathlib import Path

import numpy as np
import pytest

from tests.engine.ds_json.test_read import problems, resolve
from tests.engine.programs import Run, continued, histories, interrupted, prepare, zero

METHODS = ["powersgd", "onebit"]


def compressed(method: str, warmup_steps: int, **more) -> dict:
    section = {"method": method, "warmup_steps": warmup_steps, "min_elements": 512}
    return zero(0, gradient_compression=section | ({"rank": 2} if method == "powersgd" else {})) | more


AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}, "communication_data_type": "bf16"}
INTERRUPTED = {f"{method}-{warmup}": (compressed(method, warmup), {}) for method in METHODS for warmup in (1, 6)}
INTERRUPTED |= {f"{method}-autocast": (compressed(method, 0, **AUTOCAST), {}) for method in METHODS}
WHOLE = {
    "uncompressed": (zero(0), {}),
    **{f"{method}-{warmup}": (compressed(method, warmup), {}) for method in METHODS for warmup in (0, 3, 100)},
    **{f"{method}-split": (compressed(method, 0), {"training.micro_batch_samples": "1"}) for method in METHODS},
}


def on_two_ranks(folder: str, recipe: str, data: str) -> dict:
    return {
        "interrupted": interrupted(folder, recipe, data, INTERRUPTED),
        "whole": histories(f"{folder}/whole", recipe, data, WHOLE, 8),
    }


def alone(folder: str, recipe: str, data: str) -> dict:
    """One rank: the warning, and the checkpoints of two ranks continued."""
    run = Run(recipe, data, compressed("onebit", 0), Path(folder) / "alone")
    run.close()
    return {"warnings": run.plan.warnings, "continued": continued(folder, recipe, data, INTERRUPTED, 2)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, on_ranks):
    folder = tmp_path_factory.mktemp("compressed")
    arguments = str(folder), *prepare(folder, blocks=2)
    two = on_ranks(2, on_two_ranks, *arguments)
    one = on_ranks(1, alone, *arguments)
    back = on_ranks(2, continued, *arguments, INTERRUPTED, 2)
    return two, one[0], back


def curve(history: list[dict]) -> np.ndarray:
    return np.array([(step["loss"], step["objective"], step["grad_norm"]) for step in history])


@pytest.mark.parametrize("method", METHODS)
def test_warm_up_is_the_uncompressed_run_to_the_bit(runs, method):
    for rank in runs[0]:
        plain, warm = rank["whole"]["uncompressed"], rank["whole"][f"{method}-100"]
        np.testing.assert_array_equal(curve(warm["history"]), curve(plain["history"]))
        for name, weight in plain["weights"].items():
            np.testing.assert_array_equal(warm["weights"][name], weight)
        partly = curve(rank["whole"][f"{method}-3"]["history"])
        # the fourth step is the first compressed one: its loss is still the same, its gradient is not
        np.testing.assert_array_equal(partly[:3], curve(plain["history"])[:3])
        assert partly[3, 0] == curve(plain["history"])[3, 0]
        assert (partly[3:, 2] != curve(plain["history"])[3:, 2]).all()


@pytest.mark.parametrize("name", [name for name in WHOLE if name != "uncompressed"])
def test_all_ranks_keep_the_same_weights(runs, name):
    first, second = (rank["whole"][name] for rank in runs[0])
    for key, weight in first["weights"].items():
        np.testing.assert_array_equal(second["weights"][key], weight)
    np.testing.assert_array_equal(curve(first["history"]), curve(second["history"]))


def test_accumulation_compresses_the_gradient_of_the_whole_step(runs):
    """Once a step, whether it has two micro-batches or four: the same bytes, and for PowerSGD the same curve.

    PowerSGD depends on the ranks' gradients through their mean alone; signs also depend on which rank had which row.
    """
    for method in METHODS:
        whole, split = (runs[0][0]["whole"][f"{method}-{kind}"]["history"] for kind in ("0", "split"))
        assert {step["wire_bytes"] for step in whole} == {step["wire_bytes"] for step in split}
        assert method == "onebit" or np.allclose(curve(split), curve(whole), rtol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_loss_stays_near_the_uncompressed_run(runs, method):
    """Of what the uncompressed run gains in the steps after the warm-up, the compressed one keeps at least half.

    Half lies between what is measured (0.68 for PowerSGD of rank 2, 0.90 for one bit) and the nothing or less that is
    left by gradients that are not the mean's, residuals that are lost, or a Q that never turns.
    """
    plain, ours = (curve(runs[0][0]["whole"][name]["history"])[3:, 0] for name in ("uncompressed", f"{method}-3"))
    assert plain[0] == ours[0]
    assert ours[0] - ours[-1] > 0.5 * (plain[0] - plain[-1])


@pytest.mark.parametrize("method", METHODS)
def test_fewer_bytes_are_sent_once_warm(runs, method):
    for rank in runs[0]:
        sent = [step["wire_bytes"] for step in rank["whole"][f"{method}-3"]["history"]]
        assert len(set(sent[:3])) == len(set(sent[3:])) == 1
        assert sent[0] > 8 * sent[3]
        assert {step["wire_bytes"] for step in rank["whole"]["uncompressed"]["history"]} == {None}


@pytest.mark.parametrize("name", INTERRUPTED)
def test_an_interrupted_run_continues_to_the_bit(runs, name):
    for rank in runs[0]:
        result = rank["interrupted"][name]
        np.testing.assert_array_equal(curve(result["history"]), curve(result["expected"]))


@pytest.mark.parametrize("name", INTERRUPTED)
def test_one_rank_and_two_again_continue(runs, name):
    """One rank does not compress, so it only stays close to the run on two."""
    two, one, back = runs
    expected, loss = (
        two[0]["interrupted"][name]["expected"],
        [step["loss"] for step in one["continued"][name]["history"]],
    )
    np.testing.assert_allclose(loss, [step["loss"] for step in expected[4:6]], rtol=0.05)
    assert [step["step"] for step in back[0][name]["history"]] == [7, 8]
    for key, weight in back[0][name]["weights"].items():
        np.testing.assert_array_equal(back[1][name]["weights"][key], weight)
    np.testing.assert_allclose(
        [s["loss"] for s in back[0][name]["history"]], [s["loss"] for s in expected[6:]], rtol=0.05
    )


def test_one_rank_is_told_that_nothing_is_compressed(runs):
    assert any("gradient_compression has no effect on one rank" in warning for warning in runs[1]["warnings"])


SECTION = {"method": "powersgd"}


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (
            {"gradient_compression": {"method": "powersgd", "rang": 2}},
            "'gradient_compression.rang'; did you mean 'rank'",
        ),
        ({"gradient_compression": {"method": "topk"}}, "gradient_compression.method"),
        ({"gradient_compression": {}}, "gradient_compression.method: Field required"),
        ({"gradient_compression": {"method": "powersgd", "rank": 0}}, "gradient_compression.rank"),
        ({"gradient_compression": {"method": "onebit", "rank": 2}}, "rank has an effect with method powersgd only"),
        ({"gradient_compression": SECTION, "zero_optimization": {"stage": 2}}, "use ZeRO stage 0"),
        ({"gradient_compression": SECTION, "pipeline": {"stages": 2}}, "the whole model on every rank"),
        ({"gradient_compression": SECTION, "sequence_parallel_size": 2}, "the whole model on every rank"),
        (
            {"gradient_compression": SECTION, "torch_autocast": {"enabled": True, "dtype": "float16"}},
            "torch_autocast with bfloat16",
        ),
        ({"gradient_comression": SECTION}, "did you mean 'gradient_compression'"),
    ],
)
def test_what_is_refused(config, part):
    assert any(part in problem for problem in problems(config))


def test_what_is_accepted():
    for section in (SECTION, {"method": "onebit", "warmup_steps": 0}):
        assert resolve({"gradient_compression": section, **AUTOCAST})[0]["gradient_compression"] == section
