"""Which keys and values a DeepSpeed JSON may hold here, each mistake with the nearest name or the reason.

DeepSpeed's own config classes judge the sections that have one. The classes below stand for what DeepSpeed reads as plain
dicts, where it ignores a misspelled key and passes any value through.
"""

import types
import typing
from typing import Any, Literal

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.runtime import config as deepspeed_config
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import ErrorDetails

from engine.reduction.compression import GradientCompression
from training.config import did_you_mean

Dtype = Literal["fp32", "fp16", "bf16"]


class PlainSection(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TopLevel(PlainSection):
    """The keys outside of sections."""

    train_batch_size: PositiveInt
    train_micro_batch_size_per_gpu: PositiveInt
    gradient_accumulation_steps: PositiveInt
    gradient_clipping: NonNegativeFloat
    sequence_parallel_size: PositiveInt = 1
    sequence_parallel_exchange: Literal["heads", "keys"] = "heads"
    steps_per_print: PositiveInt | None = None
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False
    dump_state: bool = False
    disable_python_gc: bool = False
    log_level: str | None = None
    communication_data_type: Dtype | None = None
    seq_parallel_communication_data_type: Dtype | None = None
    disable_allgather: bool = False
    dataloader_drop_last: bool = False
    prescale_gradients: bool = False
    gradient_predivide_factor: PositiveFloat = 1.0
    zero_allow_untested_optimizer: bool = False
    zero_force_ds_cpu_optimizer: bool = True


class TorchAutocast(PlainSection):
    enabled: bool = False
    dtype: Literal["bfloat16", "float16"] | None = None
    lower_precision_safe_modules: list[str] | None = None


class DataTypes(PlainSection):
    grad_accum_dtype: Dtype | None = None
    param_dtype: Dtype | None = None
    buffer_dtype: Dtype | None = None
    keep_in_fp32_modules: Literal["auto"] | list[str] | None = None


class ParallelWrite(PlainSection):
    pipeline_stage: bool = False


class Checkpoint(PlainSection):
    tag_validation: Literal["Ignore", "Warn", "Fail"] = "Warn"
    use_node_local_storage: Literal[False] = False
    parallel_write: ParallelWrite = ParallelWrite()


class FlopsProfiler(PlainSection):
    enabled: bool = False
    recompute_fwd_factor: NonNegativeFloat = 0.0
    profile_step: PositiveInt = 1
    module_depth: int = -1
    top_modules: int = 1
    detailed: bool = True
    output_file: str | None = None


class ThroughputTimer(PlainSection):
    enabled: bool = True
    synchronized: bool = True


class Timers(PlainSection):
    throughput: ThroughputTimer = ThroughputTimer()


class Pipeline(PlainSection):
    """`stages` and `partition` are DeepSpeed's names, which it does not read itself; here they cut the layer plan."""

    stages: PositiveInt = 1
    partition: str = Field(default="flops", pattern=r"^(flops|parameters|uniform|type:.+)$")
    use_reentrant: Literal[False] = False


class TensorParallel(PlainSection):
    """`autotp_size` is DeepSpeed's name; the matrices are divided by `engine.layout.tensor`, not by its AutoTP."""

    autotp_size: PositiveInt
    split_rows: bool = False
    tp_overlap_comm: bool = True


class Planned(PlainSection):
    """What `tools.plan` said; a run on so many ranks compares itself with it (`engine.run.planned`)."""

    ranks: PositiveInt
    step_seconds: PositiveFloat | None = None
    rank_memory: PositiveInt | None = None
    """Bytes."""


class Aio(PlainSection):
    block_size: PositiveInt = 1048576
    queue_depth: PositiveInt = 8
    intra_op_parallelism: PositiveInt = 1
    single_submit: bool = False
    overlap_events: bool = True
    use_gds: bool = False


SECTIONS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "fp16": DeepSpeedFP16Config,
    "comms_logger": CommsLoggerConfig,
    "torch_autocast": TorchAutocast,
    "data_types": DataTypes,
    "checkpoint": Checkpoint,
    "flops_profiler": FlopsProfiler,
    "aio": Aio,
    "timers": Timers,
    "gradient_compression": GradientCompression,
    "pipeline": Pipeline,
    "tensor_parallel": TensorParallel,
    "planned": Planned,
}
KNOWN = {*TopLevel.model_fields, *SECTIONS, "optimizer"}
REFUSED = {
    "scheduler": "the schedule belongs to the recipe (section schedule); remove it from the JSON",
    "activation_checkpointing": "it does nothing by itself; set training.activation_checkpointing in the recipe",
    "wandb": "set logging.wandb in the recipe (logging.wandb_project, logging.wandb_entity, logging.wandb_group); remove it",
    "tensorboard": "set logging.tensorboard in the recipe, which resumes and goes back with the run; remove it",
    "csv_monitor": "RUN/metrics.jsonl has every figure, whatever logging.wandb and logging.tensorboard say; remove it",
    "comet": "there is logging.wandb and logging.tensorboard in the recipe, and RUN/metrics.jsonl always; remove it",
    "data_efficiency": "it needs DeepSpeed's own data loader, which cannot resume; remove it",
    "autotuning": "it ends the process in the middle of a step; remove it",
    "managed_gradient_accumulation": "the accumulation boundary is Longform's; remove it",
    "gradient_allreduce_op": "the loss is weighted for averaging by DeepSpeed; remove it",
}
MAY_BE_OFF = {"wandb", "tensorboard", "csv_monitor", "comet", "data_efficiency", "autotuning", "hybrid_engine"}
"""Sections that are taken, and left out, where they say `"enabled": false`."""
UNSUPPORTED = {"expert_parallel", "compile", "hybrid_engine"}
NOT_CHOSEN = {
    f"tensor_parallel.{field.alias or name}": "how matrices are cut follows from the model's layers; remove it"
    for name, field in TPTrainingConfig.model_fields.items()
    if name not in TensorParallel.model_fields
} | {
    "checkpoint.load_universal": "a checkpoint moves to another layout by itself; remove it",
    "checkpoint.writer": "Longform writes checkpoints itself, each file proved by its manifest; remove it",
}
"""Keys of sections that DeepSpeed knows, and that a run has no choice about."""


def key_problems(config: dict[str, Any]) -> list[str]:
    """A sentence for each top-level key that is unknown, removed, or not for a JSON used here."""
    problems = []
    for key in sorted(config):
        if key in MAY_BE_OFF and isinstance(config[key], dict) and config[key].get("enabled") in (False, "false"):
            continue
        if key in deepspeed_config._REMOVED_TOP_LEVEL_CONFIG_KEYS:
            problems.append(f"{key} was removed from DeepSpeed 0.19: remove it from the JSON")
        elif key in REFUSED:
            problems.append(f"{key}: {REFUSED[key]}")
        elif key in UNSUPPORTED:
            problems.append(f"{key} is not supported by train.py: remove it and choose a ZeRO stage (0 to 3)")
        elif key not in KNOWN:
            problems.append(f"unknown key {key!r}{did_you_mean(key, sorted(KNOWN))}")
    return problems


def coerce_values(config: dict[str, Any]) -> list[str]:
    """Replace every value of a known key by what DeepSpeed's pydantic classes make of it ("2" is 2, "true" is true, 1e5 is
    100000), so that all later checks, and DeepSpeed, see the same. Removes what cannot be, with a sentence each.
    """
    problems = _coerce(TopLevel, config, "")
    for name, schema in SECTIONS.items():
        problems += _coerce(schema, config.get(name, {}), f"{name}.")
    return problems


def _coerce(schema: type[BaseModel], values: dict[str, Any], prefix: str) -> list[str]:
    problems = []
    names = {key: field for name, field in schema.model_fields.items() for key in (name, field.alias) if key in values}
    for key, field in names.items():
        value, inner = values[key], _model_of(schema, key)
        if isinstance(value, dict) and inner is not None:
            problems += _coerce(inner, value, f"{prefix}{key}.")
        elif value != "auto":
            try:
                adapter = TypeAdapter(field.rebuild_annotation())
                values[key] = adapter.dump_python(adapter.validate_python(value), mode="json")
                if isinstance(values[key], int) and abs(values[key]) >= 2**63:
                    raise ValueError("more than 64 bits")
            except (ValueError, TypeError, AssertionError) as error:
                detail = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
                problems.append(f"{prefix}{key}: {detail.removeprefix('Value error, ')}, got {value!r}")
                del values[key]
    return problems


def value_problems(config: dict[str, Any]) -> list[str]:
    """A sentence for each wrong value or unknown key inside a section of a filled config.

    Removes what is wrong, so that later checks see a sound remainder.
    """
    problems = _judge(TopLevel, {key: config[key] for key in config if key in TopLevel.model_fields}, config, "")
    for name, schema in SECTIONS.items():
        if (section := config.get(name)) is None:
            continue
        for key in [key for key in section if key in deepspeed_config._REMOVED_ZERO_CONFIG_KEYS]:
            problems.append(f"{name}.{key} was removed from DeepSpeed 0.19: remove it from the JSON")
            del section[key]
        for key in [key for key in section if f"{name}.{key}" in NOT_CHOSEN]:
            if section[key] is not False:
                problems.append(f"{name}.{key}: {NOT_CHOSEN[f'{name}.{key}']}")
            del section[key]
        problems += _judge(schema, section, section, f"{name}.")
    return problems


def _judge(schema: type[BaseModel], values: dict[str, Any], owner: dict[str, Any], prefix: str) -> list[str]:
    problems = []
    try:
        schema(**values)
    except ValidationError as error:
        for detail in error.errors():
            problems.append(_sentence(prefix, schema, detail))
            owner.pop(str(detail["loc"][0]) if detail["loc"] else "", None)
    except (ValueError, AssertionError, TypeError, AttributeError) as error:
        problems.append(f"{prefix.rstrip('.')}: {' '.join(str(error).split())}")
        owner.clear()
    return problems


def _sentence(prefix: str, schema: type[BaseModel] | None, detail: ErrorDetails) -> str:
    path = [str(part) for part in detail["loc"]]
    dotted = prefix + ".".join(path)
    if detail["type"] == "extra_forbidden":
        for part in path[:-1]:
            schema = _model_of(schema, part)
        return f"unknown key '{dotted}'{did_you_mean(path[-1], _names(schema))}"
    return f"{dotted.rstrip('.')}: {detail['msg'].removeprefix('Value error, ')}, got {detail['input']!r}"


def _names(schema: type[BaseModel] | None) -> list[str]:
    return [field.alias or name for name, field in schema.model_fields.items()] if schema else []


def _model_of(schema: type[BaseModel] | None, name: str) -> type[BaseModel] | None:
    """The config class of a nested key such as `offload_optimizer`, through Optional."""
    field = next((f for key, f in schema.model_fields.items() if name in (key, f.alias)), None) if schema else None
    options = [field.annotation] if field else []
    if options and typing.get_origin(options[0]) in (typing.Union, types.UnionType):
        options = list(typing.get_args(options[0]))
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
