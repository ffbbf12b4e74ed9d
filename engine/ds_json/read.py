"""The DeepSpeed JSON: read, checked against DeepSpeed's own config classes, filled from the recipe.

DeepSpeed 0.19 ignores misspelled top-level keys, passes "auto" through and asserts on many combinations only after the
processes have found each other. Everything here happens before, and every problem is reported at once.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from deepspeed.runtime import config as deepspeed_config

from engine.ds_json.keys import KNOWN, SECTIONS, coerce_values, key_problems, value_problems
from engine.ds_json.legality import illegal_combinations
from engine.layout.mesh import Mesh, read_mesh
from launch.topology import Topology
from training.config import Recipe, did_you_mean

OPTIMIZER_KEYS = {"type", "params", "legacy_fusion"}
OPTIMIZER_PARAMS = {"lr", "betas", "eps", "weight_decay", "torch_adam", "adam_w_mode"}
NOT_FOR_DEEPSPEED = {"train_batch_size", "tensor_parallel", "planned"}
LEAST_BUCKET = 5_000_000
"""Elements that "auto" sums at a time; in narrow models the square of the width is a matrix or less."""
NEVER_AUTO = "; DeepSpeed would read the word itself: write a value or leave the key out"


class StepDivision(NamedTuple):
    """How one optimizer step is cut: `samples = micro_batch_samples * accumulation * data-parallel ranks`."""

    samples: int
    micro_batch_samples: int
    accumulation: int


class Resolved(NamedTuple):
    config: dict[str, Any]
    """To hand to `deepspeed.initialize`."""
    batch: StepDivision
    mesh: Mesh
    notices: list[str]
    """What a value was resolved to, and which keys have no effect."""


def read_ds_config(path: str | Path) -> dict[str, Any]:
    """Parse the JSON. Raises ValueError naming the line of a syntax error or a key given twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"{path}: key {twice[0]!r} is given twice")
        return dict(pairs)

    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{path}: {name} is not a number that JSON and DeepSpeed can hold")

    def finite(digits: str) -> float:
        return float(digits) if abs(float(digits)) < float("inf") else no_constant(digits)

    def in_64_bits(digits: str) -> int:
        return int(digits) if len(digits) < 20 and abs(int(digits)) < 2**63 else no_constant(f"{digits[:20]}...")

    try:
        text = Path(path).read_text(encoding="utf-8")
        tree = json.loads(
            text.removeprefix("\ufeff"),
            object_pairs_hook=unique,
            parse_constant=no_constant,
            parse_float=finite,
            parse_int=in_64_bits,
        )
    except FileNotFoundError:
        raise ValueError(f"{path}: no such DeepSpeed config") from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: a DeepSpeed config is an object with keys, not {type(tree).__name__}")
    return tree


def resolve_ds_config(
    raw: dict[str, Any],
    path: str | Path,
    recipe: Recipe,
    seq_length: int,
    topology: Topology,
    degrees: Mapping[str, int | None] | None = None,
) -> Resolved:
    """Fill and check a parsed JSON for this recipe, data and launch.

    Raises ValueError with one line a problem: unknown keys (nearest name given), removed features, values that disagree
    with the recipe, impossible batch arithmetic, illegal combinations (legal neighbour named).
    """
    config = json.loads(json.dumps(raw))
    problems = key_problems(config)
    malformed = [key for key in (*SECTIONS, "optimizer") if not isinstance(config.get(key, {}), dict)]
    problems += [f"{key} must be an object with keys, got {config[key]!r}" for key in malformed]
    for key in [key for key in config if key not in KNOWN or key in malformed]:
        del config[key]
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if isinstance(config.get(key), bool):
            problems.append(f'{key} must be a whole number above 0 or "auto", got {config.pop(key)!r}')
    problems += coerce_values(config)
    notices = _resolve_precision(config, topology.device) + without_effect(config)
    _translate_legacy_offload(config.get("zero_optimization", {}))
    problems += _fill_optimizer(config, recipe)
    mesh, mesh_problems = read_mesh(config, topology.rank, topology.world_size, degrees or {})
    batch, batch_problems = _fill_batch(config, recipe, seq_length, mesh.data)
    problems += mesh_problems + batch_problems
    _fill_zero(config, recipe, topology.device)
    config.setdefault("steps_per_print", 2**31)
    problems += [f'{key} is "auto"{NEVER_AUTO}' for key in _remove_autos(config)]
    problems += value_problems(config)
    problems += illegal_combinations(config, batch.accumulation, mesh, recipe, topology.device)
    if not problems:
        problems += _deepspeeds_own_verdict(config)
    if problems:
        raise ValueError("\n".join(f"{path}: {problem}" for problem in problems))
    return Resolved(config, batch, mesh, notices)


def _resolve_precision(config: dict[str, Any], device: torch.device) -> list[str]:
    """`"enabled": "auto"`, as `transformers` users write it: bf16 where the device has it, else fp16 on a GPU."""
    sections = {name: config[name] for name in ("bf16", "fp16") if name in config}
    autos = [name for name, section in sections.items() if section.get("enabled") == "auto"]
    for name in autos:
        other = sections.get("fp16" if name == "bf16" else "bf16", {}).get("enabled") is True
        able = device.type == "cpu" or torch.cuda.is_bf16_supported() if name == "bf16" else device.type == "cuda"
        sections[name]["enabled"] = bool(able and not other)
    return [f'{name}.enabled "auto" is taken as {str(sections[name]["enabled"]).lower()} here' for name in autos]


def _translate_legacy_offload(zero: dict[str, Any]) -> None:
    """`cpu_offload` and `cpu_offload_param` in the words of today, so that the same rules judge them."""
    pinned = zero.pop("cpu_offload_use_pin_memory", None)
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        if zero.pop(old, False) is True and zero.get(new) is None:
            zero[new] = {"device": "cpu"} | ({} if pinned is None else {"pin_memory": pinned})


def _agree(config: dict[str, Any], key: str, value: Any, recipe_key: str, label: str = "") -> list[str]:
    """Fill an absent or "auto" value from the recipe; a value that says otherwise is a problem naming both places."""
    if config.get(key, "auto") == "auto":
        config[key] = value
    same = config[key] == value or (isinstance(value, (list, tuple)) and config[key] == list(value))
    return [] if same else [f'{label}{key} is {config[key]!r} but {recipe_key} is {value!r}: make them equal or "auto"']


def _fill_optimizer(config: dict[str, Any], recipe: Recipe) -> list[str]:
    """The optimizer is built from the recipe; a block in the JSON may only say the same."""
    max_grad_norm = recipe.optimizer.max_grad_norm or 0.0
    problems = _agree(config, "gradient_clipping", max_grad_norm, "the recipe's optimizer.max_grad_norm")
    block = config.pop("optimizer", None)
    if block is None:
        return problems
    problems += [f"unknown key 'optimizer.{key}'" for key in block if key not in OPTIMIZER_KEYS]
    kind, params = block.get("type", "auto"), block.get("params", {})
    ours = recipe.optimizer.name
    if str(kind).lower() not in ("auto", ours, ours.removesuffix("w")):
        problems.append(f"optimizer.type is {kind!r} but the recipe's optimizer.name is {ours!r}: make them equal")
    if not isinstance(params, dict):
        return [*problems, f"optimizer.params must be an object with keys, got {params!r}"]
    for key in params:
        if key not in OPTIMIZER_PARAMS:
            problems.append(f"unknown key 'optimizer.params.{key}'{did_you_mean(key, sorted(OPTIMIZER_PARAMS))}")
        elif hasattr(recipe.optimizer, key):
            value, place = getattr(recipe.optimizer, key), f"the recipe's optimizer.{key}"
            problems += _agree(dict(params), key, value, place, "optimizer.params.")
    if params.get("adam_w_mode", True) is not True:
        problems.append("optimizer.params.adam_w_mode must be true: the recipe's Adam decays weights directly (AdamW)")
    return problems


def without_effect(config: dict[str, Any]) -> list[str]:
    """Sentences about keys of a coerced JSON that change nothing here."""
    block, zero, found = config.get("optimizer", {}), config.get("zero_optimization", {}), []
    params = block.get("params", {})
    choices = {
        "optimizer.legacy_fusion": block,
        "optimizer.params.torch_adam": params if isinstance(params, dict) else {},
    }
    for key, section in choices.items():
        if key.rpartition(".")[2] in section:
            found.append(f"{key} has no effect: the recipe says the optimizer")
    reasons = {
        "steps_per_print": "the recipe's logging.log_every_steps says how often a line is printed",
        "dump_state": "run.json holds the configuration",
        "timers": "the time of every step is in metrics.jsonl",
        "dataloader_drop_last": "the rows are read by Longform's own loader",
        "disable_allgather": "DeepSpeed reads it and uses it nowhere",
    }
    found += [f"{key} has no effect: {reason}" for key, reason in reasons.items() if config.get(key)]
    if "tp_overlap_comm" in config.get("tensor_parallel", {}):
        found.append("tensor_parallel.tp_overlap_comm has no effect: gradients are always summed beside other work")
    comms = config.get("comms_logger", {})
    if comms.get("enabled") is True and not comms.get("verbose"):
        found.append("comms_logger has no effect without verbose: its summary is never asked for")
    for key in ("stage3_gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save"):
        if zero.get(key) is True:
            found.append(f"zero_optimization.{key} has no effect: tools.export gathers the weights of any stage")
    return found


def _fill_batch(
    config: dict[str, Any], recipe: Recipe, seq_length: int, data_ranks: int
) -> tuple[StepDivision, list[str]]:
    """Solve `train_batch_size = micro_batch * accumulation * data_ranks` for what the JSON leaves open."""
    tokens = recipe.training.global_batch_tokens
    micro_key, accumulation_key = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
    problems = []
    for key in ("train_batch_size", micro_key, accumulation_key):
        value = config.get(key, "auto")
        if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            problems.append(f'{key} must be a whole number above 0 or "auto", got {value!r}')
            config[key] = "auto"
    samples, rest = divmod(tokens, seq_length)
    if rest:
        problems.append(
            f"training.global_batch_tokens={tokens} is not a multiple of the data's sequence length {seq_length}: "
            f"use {max(1, samples) * seq_length} or {(samples + 1) * seq_length}"
        )
        samples = max(samples, 1)
    problems += _agree(config, "train_batch_size", samples, f"the recipe's global batch ({tokens} tokens) in samples")
    if own := recipe.all_stages[0].micro_batch_samples:
        problems += _agree(config, micro_key, own, "the recipe's stages.0.micro_batch_samples")
    micro, accumulation = config.get(micro_key, "auto"), config.get(accumulation_key, "auto")
    if micro == "auto" and accumulation == "auto":
        micro = recipe.training.micro_batch_samples
    if micro == "auto":
        micro = max(1, samples // (accumulation * data_ranks))
    if accumulation == "auto":
        accumulation = max(1, samples // (micro * data_ranks))
    config[micro_key], config[accumulation_key] = micro, accumulation
    if micro * accumulation * data_ranks != samples:
        unit = micro * data_ranks
        near = sorted({max(unit, samples // unit * unit), (samples // unit + 1) * unit})
        problems.append(
            f"a step of {samples} samples ({tokens} tokens) cannot be cut into micro-batches of {micro} on "
            f"{data_ranks} data-parallel ranks with {accumulation} accumulation steps: set training.global_batch_tokens to "
            f"{' or '.join(str(n * seq_length) for n in near)}, or choose another micro-batch size"
        )
    return StepDivision(samples, micro, accumulation), problems


def _fill_zero(config: dict[str, Any], recipe: Recipe, device: torch.device) -> None:
    """The values that `transformers` users leave "auto", by its formulas but for a least bucket, and the offloaded
    optimizer's kind."""
    zero, hidden = config.get("zero_optimization", {}), recipe.model.hidden_size
    formulas = {
        "reduce_bucket_size": max(hidden * hidden, LEAST_BUCKET),
        "stage3_prefetch_bucket_size": int(0.9 * hidden * hidden),
        "stage3_param_persistence_threshold": 10 * hidden,
    }
    for key, value in formulas.items():
        if zero.get(key) == "auto":
            zero[key] = value
    if config.get("zero_force_ds_cpu_optimizer", "auto") == "auto":
        config["zero_force_ds_cpu_optimizer"] = device.type != "cpu"


def _remove_autos(tree: dict | list, prefix: str = "") -> list[str]:
    """Removes each "auto" that is left and returns its place; DeepSpeed itself knows it in one place only."""
    found = []
    for key, value in [*tree.items()] if isinstance(tree, dict) else [*enumerate(tree)]:
        place = f"{prefix}{key}"
        if isinstance(value, dict | list):
            found += _remove_autos(value, f"{place}.")
        elif value == "auto" and place != "data_types.keep_in_fp32_modules":
            found.append(place)
            if isinstance(tree, dict):
                del tree[key]
    return found


def _deepspeeds_own_verdict(config: dict[str, Any]) -> list[str]:
    """What DeepSpeed's config class itself refuses of what it is given; the batch it would divide by live ranks."""
    alone = json.loads(json.dumps({key: value for key, value in config.items() if key not in NOT_FOR_DEEPSPEED}))
    try:
        deepspeed_config.DeepSpeedConfig(alone)
    except (
        AssertionError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        deepspeed_config.DeepSpeedConfigError,
    ) as e:
        return [f"DeepSpeed refuses it: {' '.join(str(e).split())}"]
    return []
