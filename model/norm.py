"""Root-mean-square normalisation (Zhang and Sennrich 2019): x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x` [..., D], `weight` [D] -> [..., D] in the dtype of `x`; statistics in float32, or float64 for float64.

    Accelerators have a fused kernel. The CPU has none, and autograd through the separate operators is three times
    slower than `_RMSNorm`.
    """
    if x.device.type in ("cpu", "meta"):
        return _RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """n = x / rms(x), y = n * weight; dx = (g - n * mean(g * n)) / rms(x) with g = dy * weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        inverse_rms = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        normal = (wide * inverse_rms).to(x.dtype)
        ctx.save_for_backward(normal, weight, inverse_rms)
        return normal * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normal, weight, inverse_rms = ctx.saved_tensors
        grad_weight = (grad * normal).flatten(0, -2).sum(0)
        wide_grad, wide_normal = (t.to(inverse_rms.dtype) for t in (grad * weight, normal))
        along = (wide_grad * wide_normal).mean(-1, keepdim=True)
        grad_x = torch.addcmul(wide_grad, wide_normal, along, value=-1).mul_(inverse_rms)
        return grad_x.to(normal.dtype), grad_weight.to(weight.dtype), None
