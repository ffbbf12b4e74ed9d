"""Every internal of DeepSpeed and torch that this repository touches: private names, keys of files, replaced methods.

After an upgrade of either, this is the list to go through. `INTERNALS` says of each what it is for and which test would
notice that it changed; `tests/engine/test_internals.py` compares the list with the code and with the installed releases.
What has to be set on an object of theirs is set by the functions below, and nowhere else.
"""

import contextlib
import datetime
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.runtime import engine as deepspeed_engine
from deepspeed.runtime import torch_autocast
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from torch import nn
from torch.distributed import distributed_c10d as c10d


class Internal(NamedTuple):
    name: str
    module: str
    """Whose source has it."""
    used_in: str
    """Our file."""
    purpose: str
    test: str
    """What fails when it is gone or means something else."""


READ_IN = {"deepspeed": "0.19.8", "torch": "2.13.0"}
"""The releases in which the list was read."""

RESUME, LAYOUTS, NONFINITE, ADAPTERS, SPIKES = (
    f"tests/engine/test_{name}.py" for name in ("resume", "layouts", "nonfinite", "adapters", "spikes")
)
TRANSPLANT, FILES = "engine/checkpoint/transplant.py", "engine/checkpoint/deepspeed_files.py"
HELD = "engine/layout/held.py"
SAVES = "tests/engine/checkpoint/test_saving.py"
KEYS, WIRE, FLASH = "engine/ds_json/keys.py", "engine/reduction/wire.py", "model/block_attention.py"
REDUCTION, DS_JSON, C10D = "tests/engine/reduction", "tests/engine/ds_json", "torch.distributed.distributed_c10d"
HERE, STAGE_3 = "engine/internals.py", "deepspeed.runtime.zero.stage3"
ENGINE, STAGES_1_AND_2 = "deepspeed.runtime.engine", "deepspeed.runtime.zero.stage_1_and_2"

INTERNALS = [
    Internal(*row)
    for row in (
        # Set or replaced
        ("micro_steps", ENGINE, HERE, "the boundary of accumulation counts anew", "tests/engine/test_stages.py"),
        ("global_steps", ENGINE, HERE, "the step at which a run continues in another layout", RESUME),
        ("global_samples", ENGINE, HERE, "its samples", RESUME),
        ("micro_batch_size", "deepspeed.runtime.pipe.engine", HERE, "rows of a stage", "tests/engine/test_stages.py"),
        ("module_state_dict", ENGINE, HERE, "no weights beside the master weights in a checkpoint", RESUME),
        ("load_module_state_dict", ENGINE, HERE, "none are expected there", RESUME),
        ("buffered_allreduce_fallback", ENGINE, HERE, "replaced by the compressed reduction", REDUCTION),
        ("tensor_model_parallel", "deepspeed.runtime.utils", HERE, "parts add up in the gradient norm", LAYOUTS),
        ("mpu", "deepspeed.utils.groups", HERE, "another engine after this", RESUME),
        (
            "TORCH_AUTOCAST_INITIALIZED",
            "deepspeed.runtime.torch_autocast",
            HERE,
            "another engine after this",
            REDUCTION,
        ),
        ("__compatible_ops__", "deepspeed.ops", HERE, "no compilation at the start", "tests/test_train.py"),
        ("default_pg_timeout", C10D, HERE, "timeout of groups", "tests/launch"),
        ("default_pg_nccl_timeout", C10D, HERE, "timeout of groups", "a GPU"),
        ("_world", C10D, HERE, "groups to destroy", "tests/engine/test_internals.py"),
        ("pg_map", C10D, HERE, "groups to destroy", "tests/engine/test_internals.py"),
        ("checkpoint_engine", ENGINE, HERE, "what a checkpoint's files hold", SAVES),
        ("_copy_recovery_script", ENGINE, HERE, "no programs beside checkpoints", SAVES),
        ("_checkpoint_tag_validation", ENGINE, HERE, "no wait for what all ranks know", SAVES),
        (
            "_save",
            "torch.serialization",
            "engine/checkpoint/snapshot.py",
            "what a file holds, before it is there",
            SAVES,
        ),
        ("_open_zipfile_writer", "torch.serialization", "engine/checkpoint/snapshot.py", "writes it", SAVES),
        # Overridden, or looked up by DeepSpeed on objects of ours
        ("_partition_layers", "deepspeed.runtime.pipe.module", "engine/layout/pipeline.py", "own bounds", LAYOUTS),
        ("_set_bounds", "deepspeed.runtime.pipe.module", "engine/layout/pipeline.py", "own bounds", LAYOUTS),
        ("stage_id", "deepspeed.runtime.pipe.module", "engine/layout/pipeline.py", "own bounds", LAYOUTS),
        ("tied_comms", "deepspeed.runtime.pipe.module", "engine/layout/pipeline.py", "nothing to sum", ADAPTERS),
        ("_global_grad_norm", ENGINE, "engine/optimizer.py", "the norm that the engine reports", LAYOUTS),
        ("_global_grad_norm", STAGES_1_AND_2, "engine/engine.py", "the norm before the update", SPIKES),
        ("overflow", ENGINE, "engine/optimizer.py", "whether the step was skipped", NONFINITE),
        ("averaged_gradients", STAGES_1_AND_2, "engine/optimizer.py", "sums of a skipped step", NONFINITE),
        ("_dynamo", "torch", "model/loss.py", "one compilation for all numbers of rows", "tests/model/test_loss.py"),
        ("_disable_dynamo", "torch", "model/compiled.py", "not compiled", "tests/engine/test_compile.py"),
        (
            "__dynamo_disable",
            "torch._compile",
            "planner/shapes.py",
            "forgotten after a trial",
            "tests/tools/test_plan.py",
        ),
        ("_foreach_mul_", "torch", "engine/optimizer.py", "clipping", LAYOUTS),
        ("_foreach_mul_", "torch", "training/separate_adamw.py", "clipping", ADAPTERS),
        ("ds_id", "deepspeed.runtime.zero.partition_parameters", "engine/layout/tensor.py", "is partitioned", LAYOUTS),
        ("ds_id", "deepspeed.runtime.zero.partition_parameters", "engine/build.py", "is partitioned", LAYOUTS),
        # Read: states in a live engine
        ("_hp_mapping", "deepspeed.utils.mixed_precision_linkage", HELD, "places in flat vectors", RESUME),
        ("hp_fragment_address", "deepspeed.utils.tensor_fragment", HELD, "places in flat vectors", RESUME),
        ("lp_fragment_address", "deepspeed.utils.tensor_fragment", HELD, "places in a parameter", RESUME),
        ("bf16_groups", "deepspeed.runtime.bf16_optimizer", HELD, "parameters of a flat vector", RESUME),
        ("bit16_groups", STAGES_1_AND_2, HELD, "parameters of a flat vector", RESUME),
        ("update_lp_params", STAGES_1_AND_2, TRANSPLANT, "half precision from master weights", RESUME),
        ("update_lp_params", STAGES_1_AND_2, "engine/run/resume.py", "half precision from master weights", RESUME),
        ("fp32_groups_flat_partition", "deepspeed.runtime.bf16_optimizer", HELD, "master weights", RESUME),
        ("single_partition_of_fp32_groups", STAGES_1_AND_2, HELD, "master weights", RESUME),
        ("fp32_partitioned_groups_flat", STAGE_3, HELD, "master weights", RESUME),
        ("ds_shape", "deepspeed.runtime.zero.partition_parameters", "engine/matrices.py", "of a whole matrix", LAYOUTS),
        ("fp16_groups", STAGE_3, HELD, "parameters of a sub-group", RESUME),
        ("fp32_partitioned_groups_flat", STAGE_3, TRANSPLANT, "master weights", RESUME),
        ("fp16_partitioned_groups_flat", STAGE_3, TRANSPLANT, "half precision from master weights", RESUME),
        ("fp16_partitioned_groups", STAGE_3, TRANSPLANT, "half precision from master weights", RESUME),
        ("partition_numel", "deepspeed.runtime.zero.partition_parameters", HELD, "a rank's share", RESUME),
        ("checkpoint_event_prologue", STAGE_3, TRANSPLANT, "persistent parameters are partitioned", RESUME),
        ("checkpoint_event_epilogue", STAGE_3, TRANSPLANT, "and whole again", RESUME),
        ("dp_process_group", STAGE_3, HELD, "whose shares these are", RESUME),
        ("ds_numel", "deepspeed.runtime.zero.partition_parameters", HELD, "elements of a parameter", RESUME),
        # Read: keys of files
        ("_checkpoint_offset", "torch.serialization", "engine/safe_load.py", "where a tensor begins", RESUME),
        ("module", ENGINE, FILES, "weights at stage 0", RESUME),
        ("optimizer", ENGINE, FILES, "moments at stage 0", RESUME),
        ("param_shapes", ENGINE, FILES, "which parameters, in which order", RESUME),
        ("optimizer_state_dict", ENGINE, FILES, "what a rank's file holds", RESUME),
        ("fp32_flat_groups", "deepspeed.checkpoint.constants", FILES, "master weights at stage 3", RESUME),
        ("single_partition_of_fp32_groups", "deepspeed.checkpoint.constants", FILES, "master weights", RESUME),
        ("base_optimizer_state", "deepspeed.checkpoint.constants", FILES, "moments at stages 1 and 2", RESUME),
        ("param_alignment_paddings", "deepspeed.checkpoint.constants", FILES, "gaps between parameters", RESUME),
        # Read: the configuration
        ("_REMOVED_TOP_LEVEL_CONFIG_KEYS", "deepspeed.runtime.config", KEYS, "refused keys", DS_JSON),
        ("_REMOVED_ZERO_CONFIG_KEYS", "deepspeed.runtime.config", KEYS, "refused keys", DS_JSON),
        # Collectives, counted at the methods that carry them out
        ("_allgather_base", "older torch", WIRE, "counted", REDUCTION),
        ("_reduce_scatter_base", "older torch", WIRE, "counted", REDUCTION),
        # Kernels
        ("_scaled_dot_product_flash_attention_for_cpu", "torch", FLASH, "attention in blocks", "tests/model"),
        ("_scaled_dot_product_flash_attention_for_cpu", "torch", "planner/exchanges.py", "its memory", "tests/planner"),
        ("_scaled_dot_product_flash_attention_for_cpu_backward", "torch", FLASH, "its gradient", "tests/model"),
        (
            "_attn_implementation",
            "transformers",
            "model/hf/modeling_longform.py",
            "which kernel a user asked for",
            "tests/model",
        ),
    )
]


def restart_accumulation(engine: DeepSpeedEngine) -> None:
    """Count micro-batches from here on, where a step has another number of them."""
    engine.micro_steps = 0


def continue_from(engine: DeepSpeedEngine, step: int, samples: int) -> None:
    engine.global_steps, engine.global_samples = step, samples


def leave_out_module_weights(engine: DeepSpeedEngine) -> None:
    """Of checkpoints, and load none: at stages 1 and 2 the optimizer's files have them in full precision."""
    engine.module_state_dict = lambda **_: {}
    engine.load_module_state_dict = lambda **_: None


@contextlib.contextmanager
def saving_through(engine: DeepSpeedEngine, files: CheckpointEngine) -> Iterator[None]:
    """Within it, what `save_checkpoint` would write goes to `files`, and nothing else is written.

    The ranks do not compare their tags, for which all would wait twice: they have made them of the same step.
    """
    usual, engine.checkpoint_engine = engine.checkpoint_engine, files
    engine._copy_recovery_script = engine._checkpoint_tag_validation = lambda _: None
    try:
        yield
    finally:
        engine.checkpoint_engine = usual
        del engine._copy_recovery_script, engine._checkpoint_tag_validation


def set_micro_batch_size(engine: DeepSpeedEngine, rows: int) -> None:
    """A pipeline engine keeps a number of its own, beside the one of its base class."""
    engine.micro_batch_size = rows


def replace_average(engine: DeepSpeedEngine, reduce: Callable[..., None]) -> Callable[..., None]:
    """Let `reduce` take the place of the average of gradients at stage 0; returns what it was."""
    average, engine.buffered_allreduce_fallback = engine.buffered_allreduce_fallback, reduce
    return average


def mark_as_part(parameter: nn.Parameter) -> None:
    """Of what adds up over the tensor-parallel group in the gradient norm."""
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def replace_collective(method: str, function: Any) -> None:
    """Of every process group."""
    setattr(torch.distributed.ProcessGroup, method, function)


def leave_out_shared_memory_collective() -> None:
    """It is for inference, and would be compiled at every start."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def set_timeout_of_groups(timeout: datetime.timedelta) -> None:
    """Of those that DeepSpeed makes, which take torch's defaults."""
    c10d.default_pg_timeout = c10d.default_pg_nccl_timeout = timeout


def forget_engine() -> None:
    """Let DeepSpeed forget the ranks of an engine that was destroyed, and that it computed under autocast."""
    deepspeed_engine.groups.mpu = None
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = False


def process_groups() -> list[torch.distributed.ProcessGroup]:
    """All but the one of all ranks."""
    return list(set(c10d._world.pg_map) - {c10d.GroupMember.WORLD})
