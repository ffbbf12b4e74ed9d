"""Combinations of DeepSpeed settings that cannot work here, each with the nearest one that can."""

import os
from typing import Any

import torch

from engine.layout.mesh import Mesh
from engine.layout.tensor import tensor_problems
from training.config import Recipe

SUB_GROUP_SIZE = 10**9
"""DeepSpeed's default."""
Checks = list[tuple[bool, str]]
"""Whether a combination is there, and the sentence about it."""


def illegal_combinations(
    config: dict[str, Any], accumulation: int, mesh: Mesh, recipe: Recipe, device: torch.device
) -> list[str]:
    """One sentence for each illegal combination in a filled config whose sections hold only known keys."""
    checks = _precision(config, accumulation, device) + _zero(config, mesh, device) + _layout(config, mesh, recipe)
    if "gradient_compression" in config:
        checks += _compression(config, mesh)
    if recipe.adapters.names:
        checks += _adapters(config, recipe)
    if recipe.objective.name == "contrastive":
        checks += _contrast(accumulation, mesh)
    return [sentence for broken, sentence in checks if broken] + tensor_problems(recipe.model, mesh)


def _stage(config: dict[str, Any]) -> int:
    return config.get("zero_optimization", {}).get("stage", 0)


def _enabled(config: dict[str, Any], *sections: str) -> list[bool]:
    return [bool(config.get(section, {}).get("enabled", False)) for section in sections]


def _quantized(config: dict[str, Any]) -> list[str]:
    zero = config.get("zero_optimization", {})
    return [key for key in ("zero_quantized_weights", "zero_quantized_gradients") if zero.get(key)]


def _offload_devices(config: dict[str, Any]) -> dict[str, str]:
    zero = config.get("zero_optimization", {})
    devices = {key: (zero.get(key) or {}).get("device", "none") for key in ("offload_optimizer", "offload_param")}
    return {key: device for key, device in devices.items() if device != "none"}


def _precision(config: dict[str, Any], accumulation: int, device: torch.device) -> Checks:
    bf16, fp16, autocast = _enabled(config, "bf16", "fp16", "torch_autocast")
    accumulate, stage = config.get("data_types", {}).get("grad_accum_dtype"), _stage(config)
    return [
        (
            bf16 and fp16,
            "bf16 and fp16 are both enabled: keep one",
        ),
        (
            fp16 and device.type == "cpu",
            "fp16 does not train on a CPU: use bf16, or neither for float32",
        ),
        (
            bf16 and stage == 0,
            "ZeRO stage 0 with bf16 neither accumulates gradients nor keeps reachable weights in float32: use stage 1, or "
            "torch_autocast with bfloat16 at stage 0",
        ),
        (
            bf16 and accumulate is None and accumulation > 1 and stage > 0,
            'bf16 gradients would be accumulated over micro-batches in bf16: add "data_types": '
            '{"grad_accum_dtype": "fp32"} (or "bf16" to accept the loss of precision)',
        ),
        (
            autocast and (bf16 or fp16),
            "torch_autocast keeps float32 weights and excludes bf16/fp16: keep one of them",
        ),
    ]


def _zero(config: dict[str, Any], mesh: Mesh, device: torch.device) -> Checks:
    zero, stage, quantized = config.get("zero_optimization", {}), _stage(config), _quantized(config)
    devices = _offload_devices(config)
    nvme_folders = sorted({str(zero[key].get("nvme_path")) for key in devices if devices[key] == "nvme"})
    group = zero.get("zero_hpz_partition_size", 1)
    return [
        (
            "offload_optimizer" in devices and stage not in (1, 2, 3),
            "zero_optimization.offload_optimizer needs stage 1, 2 or 3: raise the stage or remove it",
        ),
        (
            "offload_param" in devices and stage != 3,
            "zero_optimization.offload_param needs stage 3: raise the stage or remove it",
        ),
        (
            bool(quantized) and device.type == "cpu",
            f"{', '.join(quantized)}: the quantization kernels exist only on GPUs; remove them on a CPU",
        ),
        (
            bool(quantized) and stage != 3,
            f"{', '.join(quantized)} (ZeRO++) need zero_optimization.stage 3",
        ),
        (
            bool(nvme_folders) and not _has_async_io(),
            "offload to nvme needs the async_io operator (install libaio-dev): use device cpu",
        ),
        (
            any(not os.access(folder, os.W_OK) for folder in nvme_folders),
            f"offload to nvme: {' and '.join(nvme_folders)} must be a folder that can be written on every host: name one on a "
            "local disk in nvme_path",
        ),
        (
            group > 1 and (stage != 3 or mesh.world_size % group > 0),
            f"zero_optimization.zero_hpz_partition_size {group} must be the ranks of a host at stage 3, and divide the "
            f"{mesh.world_size} ranks of this launch: remove it, or start a multiple of {group} ranks",
        ),
    ]


def _layout(config: dict[str, Any], mesh: Mesh, recipe: Recipe) -> Checks:
    stage, pipeline, muon = _stage(config), "pipeline" in config, recipe.optimizer.is_muon
    optimizer = recipe.optimizer.name
    fp16, profiler = _enabled(config, "fp16", "flops_profiler")
    profiling = ["wall_clock_breakdown"] * (config.get("wall_clock_breakdown") is True) + ["flops_profiler"] * profiler
    hpz = config.get("zero_optimization", {}).get("zero_hpz_partition_size", 1) > 1
    grouped = _quantized(config) + ["zero_hpz_partition_size"] * hpz
    return [
        (
            pipeline and stage != 1,
            f"a pipeline with ZeRO stage {stage} "
            + (
                "clips by the gradients of the first stage alone: use stage 1"
                if stage == 0
                else "is impossible, each stage reduces its gradients only at the end of the step: use stage 1"
            ),
        ),
        (
            recipe.training.compile and stage == 3,
            "the recipe's training.compile is for blocks without collectives, which ZeRO stage 3 puts into each: set it to "
            "false, or use ZeRO stage 2",
        ),
        (
            muon and fp16,
            f"the recipe's optimizer.name {optimizer} has not been tried with fp16: use bf16, float32 or adamw",
        ),
        (
            muon and "nvme" in _offload_devices(config).values(),
            f"the recipe's optimizer.name {optimizer} needs its states in memory: offload to cpu, or use adamw",
        ),
        (
            pipeline and bool(profiling),
            f"{', '.join(profiling)} stop a pipeline at its first step: remove them",
        ),
        (
            mesh.tensor > 1 and bool(grouped),
            f"{', '.join(grouped)} (ZeRO++) group ranks that hold different parts under tensor_parallel: remove one of them",
        ),
    ]


def _compression(config: dict[str, Any], mesh: Mesh) -> Checks:
    stage, (fp16, autocast) = _stage(config), _enabled(config, "fp16", "torch_autocast")
    return [
        (
            stage != 0,
            "gradient_compression averages whole gradients: use ZeRO stage 0, or instead of it "
            '"communication_data_type": "bf16", which halves the bytes of gradients in every stage',
        ),
        (
            mesh.data != mesh.world_size,
            "gradient_compression needs the whole model on every rank: remove it, or pipeline, tensor_parallel and "
            "sequence_parallel_size",
        ),
        (
            (fp16 or (autocast and config["torch_autocast"].get("dtype") == "float16")),
            "gradient_compression keeps residuals from step to step, which a changing loss scale would falsify: use "
            "float32, or torch_autocast with bfloat16",
        ),
    ]


def _adapters(config: dict[str, Any], recipe: Recipe) -> Checks:
    sub_group = config.get("zero_optimization", {}).get("sub_group_size", SUB_GROUP_SIZE)
    largest = max(map(recipe.model.num_parameters_of_adapter, recipe.adapters.names))
    return [
        (
            "gradient_compression" in config,
            "gradient_compression is for whole models, and the gradients of adapters are small: remove it",
        ),
        (
            "nvme" in _offload_devices(config).values(),
            "adapters need their states in memory: offload to cpu",
        ),
        (
            _stage(config) == 3 and sub_group < largest,
            f"zero_optimization.sub_group_size {sub_group} would divide an adapter of {largest} parameters, which is clipped as "
            "one: raise it above that",
        ),
    ]


def _contrast(accumulation: int, mesh: Mesh) -> Checks:
    return [
        (
            mesh.data < mesh.world_size,
            "objective.name contrastive compares the pairs of data-parallel ranks: leave pipeline, tensor and sequence "
            "parallelism out",
        ),
        (
            accumulation > 1,
            f"objective.name contrastive compares all pairs of a step, which is divided into {accumulation} micro-batches: raise "
            "training.micro_batch_samples, or use more ranks",
        ),
    ]


def _has_async_io() -> bool:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return AsyncIOBuilder().is_compatible(verbose=False)
