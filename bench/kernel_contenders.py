"""The kernels that `bench.kernels` measures."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

HEADS, WIDTH, BLOCK = 12, 64, 128
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Causal: [H, T, d] three times -> [H, T, d]."""


def scores(q: Tensor, k: Tensor, first: int, last: int) -> Tensor:
    """[H, b, last] of the queries first .. last - 1, -infinity where the key comes later."""
    wide = torch.bmm(q[:, first:last], k[:, :last].transpose(1, 2)).float() * WIDTH**-0.5
    later = torch.ones(last - first, last - first, dtype=torch.bool).triu(1)
    return torch.cat([wide[:, :, :first], wide[:, :, first:].masked_fill(later, -math.inf)], -1)


def forward_block(q: Tensor, k: Tensor, v: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Output [H, b, d] of those queries and their log-sum-exps [H, b, 1]."""
    wide = scores(q, k, first, last)
    logsumexp = wide.logsumexp(-1, keepdim=True)
    return torch.bmm((wide - logsumexp).exp().to(q.dtype), v[:, :last]), logsumexp


def backward_block(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, out: Tensor, logsumexp: Tensor, first: int, last: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of those queries, and what they add to those of the keys and values up to `last`."""
    p = (scores(q, k, first, last) - logsumexp).exp()
    delta = (grad.float() * out.float()).sum(-1, keepdim=True)
    dp = torch.bmm(grad, v[:, :last].transpose(1, 2)).float()
    ds = ((dp - delta) * p * WIDTH**-0.5).to(q.dtype)
    dv = torch.bmm(p.to(q.dtype).transpose(1, 2), grad)
    return torch.bmm(ds, k[:, :last]), torch.bmm(ds.transpose(1, 2), q[:, first:last]), dv


class Blocks(torch.autograd.Function):
    """[H, T, d] three times -> [H, T, d]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, forward: Callable[..., Any], backward: Callable[..., Any]
    ) -> Tensor:
        out, logsumexp = torch.empty_like(q), torch.empty(*q.shape[:2], 1)
        for first in range(0, q.shape[1], BLOCK):
            rows = slice(first, first + BLOCK)
            out[:, rows], logsumexp[:, rows] = forward(q, k, v, first, min(first + BLOCK, q.shape[1]))
        ctx.save_for_backward(q, k, v, out, logsumexp)
        ctx.backward_block = backward
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, logsumexp = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
        for first in range(0, q.shape[1], BLOCK):
            last = min(first + BLOCK, q.shape[1])
            rows = slice(first, last)
            parts = ctx.backward_block(q, k, v, grad[:, rows], out[:, rows], logsumexp[:, rows], first, last)
            dq[:, rows] = parts[0]
            dk[:, :last] += parts[1]
            dv[:, :last] += parts[2]
        return *(x.to(q.dtype) for x in (dq, dk, dv)), None, None


def contenders() -> dict[str, Attention]:
    torch._dynamo.config.recompile_limit = 64  # the first blocks are special cases to it
    compiled = [torch.compile(function, dynamic=True) for function in (forward_block, backward_block)]
    return {
        "flash": lambda q, k, v: F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0],
        "blocks": lambda q, k, v: Blocks.apply(q, k, v, forward_block, backward_block),
        "blocks compiled": lambda q, k, v: Blocks.apply(q, k, v, *compiled),
    }


def milliseconds(attention: Attention, tensors: Sequence[Tensor], grad: Tensor) -> float:
    """Of one forward and backward pass."""
    began = time.perf_counter()
    torch.autograd.grad(attention(*tensors), tensors, grad)
    return 1e3 * (time.perf_counter() - began)
