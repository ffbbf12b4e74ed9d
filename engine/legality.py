"""Combinations of DeepSpeed settings that cannot work here, each with the nearest one that can."""

from typing import Any

import torch


def illegal_combinations(config: dict[str, Any], batch, device: torch.device) -> list[str]:
    """One sentence for each illegal combination in a filled config whose sections hold only known keys."""
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    bf16, fp16 = (bool(config.get(name, {}).get("enabled", False)) for name in ("bf16", "fp16"))
    accumulate = config.get("data_types", {}).get("grad_accum_dtype")
    offload = {key: (zero.get(key) or {}).get("device", "none") for key in ("offload_optimizer", "offload_param")}
    quantized = [key for key in ("zero_quantized_weights", "zero_quantized_gradients") if zero.get(key)]
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
    ]
    return [sentence for broken, sentence in checks if broken]


def _has_async_io() -> bool:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    return AsyncIOBuilder().is_compatible(verbose=False)
