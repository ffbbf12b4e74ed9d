"""One bad step is one skipped step, in every layout that is shipped.

A run that meets a NaN in a loss and an inf in a gradient goes on, to the bit, like one that left these two steps out.
"""

import contextlib
import io
import math
import re
from pathlib import Path

import pytest
import torch

from tests.engine.programs import BF16, Poison, Run, prepare, shipped, zero

POISONS = {
    2: Poison(math.nan, rank=-1, micro_batch=0, in_gradient=False),
    4: Poison(math.inf, rank=0, micro_batch=-1, in_gradient=True),
}
STEPS = 5
ON_TWO, ON_FOUR = ({name: c for name, (on, c) in shipped().items() if on == ranks} for ranks in (2, 4))
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
ONE_MICRO_BATCH = {"training.micro_batch_samples": "4"}
LION, MUON = {"optimizer.name": "lion"}, {"optimizer.name": "muon"}
CASES = {
    **{name: (config, {}) for name, config in ON_TWO.items()},
    **{f"{name}-lion": (ON_TWO[name], LION) for name in ("zero0_fp32", "zero2_offload", "zero3")},
    "zero0-muon": (ON_TWO["zero0"], MUON),
    "zero2-muon": (ON_TWO["zero2"], MUON),
    "zero2-offload-fp32": (zero(2, zero=OFFLOAD), {}),
    "zero1-offload": (zero(1, zero=OFFLOAD, **BF16), {}),
    "zero2-offload-one-micro-batch": (ON_TWO["zero2_offload"], ONE_MICRO_BATCH),
    "zero2-offload-bf16-sums": (zero(2, zero=OFFLOAD, bf16={"enabled": True}), ONE_MICRO_BATCH),
}
SHARED = {
    # ranks that hold other layers, other parts of every layer or other tokens of a row, and ranks with other rows
    "pipeline": (ON_TWO["pipeline"] | {"pipeline": {"stages": 2}}, {}),
    **{name: (ON_TWO[name], {}) for name in ("tensor2_zero0_fp32", "tensor2_zero3", "sequence2_zero2")},
    **{name: (config, {}) for name, config in ON_FOUR.items()},
    "pipeline2-rows2": (zero(1, pipeline={"stages": 2}, tensor_parallel={"autotp_size": 2, "split_rows": True}), {}),
}
MISSING_DEVICE = re.compile(r"\bCPU\b|\bGPUs?\b|nvme")


def compressing(config: dict) -> dict:
    """The same JSON, compressing from the first step on."""
    section = config.get("gradient_compression")
    return config | ({"gradient_compression": section | {"warmup_steps": 0}} if section else {})


def held(run: Run) -> list[bytes]:
    """Bytes of all that this rank carries from step to step: weights, their float32 copies, moments, residuals."""
    engine, leaves = run.engine, []
    leaves += [getattr(parameter, "ds_tensor", parameter) for parameter in engine.module.parameters()]
    for master, moments in engine.base_optimizer.state.items():
        leaves += [master, *(moments[key] for key in sorted(moments))]
    if compression := engine.reduction:
        trees = [compression.residuals, compression._compressor.state()]
        leaves += torch.utils._pytree.tree_leaves(trees)
    tensors = [torch.as_tensor(leaf).detach() for leaf in leaves if leaf is not None]
    return [tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() for tensor in tensors]


def interrupted(folder: Path, recipe: str, data: str, config: dict, overrides: dict) -> dict:
    """A run with the poisoned steps, and one that leaves them out; compressing, if at all, from the first step on."""
    config, overrides = compressing(config), overrides | {"model.num_hidden_layers": "2"}
    try:
        run = Run(recipe, data, config, folder, overrides)
    except ValueError as error:
        return {"refused": str(error)}
    history, unchanged = [], []
    for number in range(1, STEPS + 1):
        before = held(run)
        history += run.steps(1, POISONS.get(number))
        unchanged.append(held(run) == before)
    result = {"history": history, "unchanged": unchanged, "state": run.state.model_dump(), "held": held(run)}
    run.close()
    reference, losses = Run(recipe, data, config, folder, overrides), []
    for number in range(1, STEPS + 1):
        if number in POISONS:
            reference.state.advance(reference.plan.batch.samples, reference.plan.step_tokens, applied=False)
        else:
            losses += reference.steps(1)
    result |= {"reference": losses, "same": held(reference) == result.pop("held")}
    reference.close()
    return result


def quietly(*arguments) -> dict:
    with contextlib.redirect_stdout(io.StringIO()):
        return interrupted(*arguments)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nonfinite")
    return folder, *prepare(folder, blocks=2)


@pytest.mark.parametrize("name", CASES)
def test_a_bad_step_is_left_out(setting, on_ranks, name):
    folder, *problem = setting
    check(on_ranks(2, quietly, folder / name, *problem, *CASES[name]))


@pytest.mark.parametrize("name", SHARED)
def test_a_bad_step_is_left_out_by_ranks_that_share_rows(setting, on_ranks, name):
    folder, *problem = setting
    check(on_ranks(4, quietly, folder / f"{name}-on-four", *problem, *SHARED[name]))


def check(ranks: list[dict]) -> None:
    if reason := ranks[0].get("refused"):
        assert MISSING_DEVICE.search(reason), reason
        pytest.skip(reason)
    for result in ranks:
        history = result["history"]
        assert [step["applied"] for step in history] == [number not in POISONS for number in range(1, STEPS + 1)]
        assert [number in POISONS for number in range(1, STEPS + 1)] == result["unchanged"]
        for number, step in enumerate(history, start=1):
            poison = POISONS.get(number)
            assert math.isfinite(step["loss"]) == (poison is None or poison.in_gradient)
            assert math.isfinite(step["grad_norm"]) == (poison is None)
        good = [step for number, step in enumerate(history, start=1) if number not in POISONS]
        assert [step["loss"] for step in good] == [step["loss"] for step in result["reference"]]
        assert [step["grad_norm"] for step in good] == [step["grad_norm"] for step in result["reference"]]
        assert result["same"]
        state = result["state"]
        assert (state["step"], state["skipped_steps"], state["consecutive_skipped_steps"]) == (STEPS, len(POISONS), 0)
        assert state["consumed_samples"] == STEPS * 8
