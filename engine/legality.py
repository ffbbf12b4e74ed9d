"""Combinations of DeepSpeed settings that cannot work here, each with the nearest one that can."""

import os
from typing import Any

import torch

from engine.mesh import Mesh
from engine.tensor import tensor_problems
from training.config import Recipe


def illegal_combinations(config: dict[str, Any], batch, mesh: Mesh, recipe: Recipe, device: torch.device) -> list[str]:
    """One sentence for each illegal combination in a filled config whose sections hold only known keys."""
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    bf16, fp16 = (bool(config.get(name, {}).get("enabled", False)) for name in ("bf16", "fp16"))
    accumulate = config.get("data_types", {}).get("grad_accum_dtype")
    offload = {key: (zero.get(key) or {}).get("device", "none") for key in ("offload_optimizer", "offload_param")}
    pipeline = "pipeline" in config
    profiling = [
        key
        for key in ("wall_clock_breakdown", "flops_profiler")
        if config.get(key) is True or (isinstance(config.get(key), dict) and config[key].get("enabled"))
    ]
    sections = (zero.get(key) or {} for key in ("offload_optimizer", "offload_param"))
    nvme_folders = sorted({str(s.get("nvme_path")) for s in sections if s.get("device") == "nvme"})
    group = zero.get("zero_hpz_partition_size", 1)
    quantized = [key for key in ("zero_quantized_weights", "zero_quantized_gradients") if zero.get(key)]
    autocast = config.get("torch_autocast", {})
    compressed = "gradient_compression" in config
    grouped = quantized + ["zero_hpz_partition_size"] * (group > 1)
    checks = [
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
            bf16 and accumulate is None and batch.accumulation > 1 and stage > 0,
            'bf16 gradients would be accumulated over micro-batches in bf16: add "data_types": '
            '{"grad_accum_dtype": "fp32"} (or "bf16" to accept the loss of precision)',
        ),
        (
            config.get("torch_autocast", {}).get("enabled") and (bf16 or fp16),
            "torch_autocast keeps float32 weights and excludes bf16/fp16: keep one of them",
        ),
        (
            offload["offload_optimizer"] != "none" and stage not in (1, 2, 3),
            "zero_optimization.offload_optimizer needs stage 1, 2 or 3: raise the stage or remove it",
        ),
        (
            offload["offload_param"] != "none" and stage != 3,
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
            "nvme" in offload.values() and not _has_async_io(),
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
            recipe.training.compile and (stage == 3 or mesh.tensor > 1),
            "the recipe's training.compile is for blocks without collectives, which "
            + ("ZeRO stage 3" if stage == 3 else "tensor parallelism")
            + " puts into each: set it to false, or use ZeRO stage 2",
        ),
        (
            recipe.optimizer.name == "muon" and (stage != 0 or bf16 or fp16 or mesh.tensor > 1),
            "the recipe's optimizer.name muon works on whole float32 matrices: use ZeRO stage 0 without bf16, fp16 or "
            "tensor_parallel (torch_autocast is fine), or adamw",
        ),
        (
            recipe.optimizer.name == "muon" and not hasattr(torch.optim, "Muon"),
            "the recipe's optimizer.name muon needs torch 2.9 or newer: use adamw",
        ),
        (
            pipeline and bool(profiling),
            f"{', '.join(profiling)} stop a pipeline at its first step: remove them",
        ),
        (
            mesh.tensor > 1 and bool(grouped),
            f"{', '.join(grouped)} (ZeRO++) group ranks that hold different parts under tensor_parallel: remove one of them",
        ),
        (
            bool(config.get("tensor_parallel", {}).get("tp_overlap_comm") and autocast.get("enabled")),
            "tensor_parallel.tp_overlap_comm stops at the first step under torch_autocast: remove it, or use bf16",
        ),
        (
            compressed and stage != 0,
            "gradient_compression averages whole gradients: use ZeRO stage 0, or instead of it "
            '"communication_data_type": "bf16", which halves the bytes of gradients in every stage',
        ),
        (
            compressed and mesh.data != mesh.world_size,
            "gradient_compression needs the whole model on every rank: remove it, or pipeline, tensor_parallel and "
            "sequence_parallel_size",
        ),
        (
            compressed and (fp16 or (autocast.get("enabled") and autocast.get("dtype") == "float16")),
            "gradient_compression keeps residuals from step to step, which a changing loss scale would falsify: use "
            "float32, or torch_autocast with bfloat16",
        ),
    ]
    problems = [sentence for broken, sentence in checks if broken]
    return problems + tensor_problems(recipe.model, mesh)


def _has_async_io() -> bool:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return AsyncIOBuilder().is_compatible(verbose=False)
