"""A loss that is not finite on one rank never reaches the weights, in any stage."""

import math

import pytest

from tests.engine.programs import BF16, poisoned, prepare, zero
from tests.launch import run_ranks

CONFIGS = {
    **{f"zero{stage}": zero(stage) for stage in range(4)},
    "zero0-autocast": zero(0, torch_autocast={"enabled": True, "dtype": "bfloat16"}),
    **{f"zero{stage}-bf16": zero(stage, **BF16) for stage in (1, 2, 3)},
    "pipeline": zero(1, pipeline={"stages": 2}),
    "pipeline-bf16": zero(1, pipeline={"stages": 2}, **BF16),
    **{f"tensor2-zero{stage}": zero(stage, tensor_parallel={"autotp_size": 2}) for stage in (0, 2, 3)},
    "tensor2-zero1-bf16": zero(1, tensor_parallel={"autotp_size": 2}, **BF16),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nonfinite")
    return run_ranks(poisoned, 2, str(folder), *prepare(folder), CONFIGS, timeout=300)


@pytest.mark.parametrize("name", CONFIGS)
def test_nan_on_one_rank_skips_the_step_on_all(results, name):
    for rank in results:
        result = rank[name]
        assert result["applied"] == [True, False, True]
        assert result["unchanged"]
        assert result["moved_again"]
        assert math.isnan(result["losses"][1])
        assert math.isfinite(result["losses"][2])
        state = result["state"]
        assert (state["step"], state["skipped_steps"], state["consecutive_skipped_steps"]) == (3, 1, 0)
        assert state["consumed_samples"] == 3 * 8
