"""Stand-ins for kernels and exchanges of attention that hold as much and need neither data nor other ranks.

Legend: B rows, T tokens of a row, n ranks of a sequence group, t = T / n, H query heads, K key/value heads, d head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over all keys, `q` [B, t, H, d], `k` and `v` [B, T, K, d]: a kernel that keeps its output and a number a head."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.is_meta:  # for which torch would choose the formula
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0].transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


class HeadsForTokens(torch.autograd.Function):
    """What the all-to-all of DeepSpeed-Ulysses makes: [B, t, H, d] <-> [B, n t, H / n, d]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int, scattered: bool) -> Tensor:
        ctx.ranks, ctx.scattered = ranks, scattered
        return _exchanged(x, ranks, scattered)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _exchanged(grad, ctx.ranks, not ctx.scattered), None, None


def _exchanged(x: Tensor, n: int, scattered: bool) -> Tensor:
    b, t, h, d = x.shape
    if scattered:
        sent = x.reshape(b, t, n, h // n, d).permute(2, 0, 1, 3, 4).contiguous()
        return torch.empty_like(sent).permute(1, 0, 2, 3, 4).contiguous().reshape(b, n * t, h // n, d)
    sent = x.reshape(b, n, t // n, h, d).permute(1, 0, 2, 3, 4).contiguous()
    return torch.empty_like(sent).permute(1, 2, 0, 3, 4).contiguous().reshape(b, t // n, n * h, d)


class AllKeys(torch.autograd.Function):
    """[B, t, K, d] -> [B, T, K, d]; the gradients go back in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, length: int) -> Tensor:
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return torch.cat([x, x.new_empty(x.shape[0], length - x.shape[1], *x.shape[2:])], dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.zeros(ctx.shape, dtype=torch.float32).to(ctx.dtype), None
