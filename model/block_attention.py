"""Attention over what is visible and nothing else: blocks of queries, each over the keys that it sees.

A block of queries sees a contiguous prefix of its document as a whole, and a neighbourhood of about its own size in part.
Both go through the flash kernel, and their results are merged by their log-sum-exps (Dao 2023, FlashAttention-2, 3.1),
so work follows the visible area, and no tensor is larger than the rows or a block.

Legend: B batch, T tokens of a row, N = B T flattened, n tokens of a document, H heads, d head width, b tokens of a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .documents import Documents, QueryBlock
from .visibility import Tokens, Visibility

BLOCK_TOKENS = 128
"""Small chunks are put together to about this many queries: fewer calls, at the price of a mask that hides a part."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def plan_blocks(documents: Documents, visibility: Visibility) -> list[QueryBlock]:
    """The blocks of a batch of rows, in the order of their queries."""
    assert visibility.window is None, "windows are for causal attention"
    tokens, blocks, start = documents.tokens(), [], 0
    half = sum(documents.lengths) // len(documents.position_ids) // 2
    for length in documents.lengths:
        noised = documents.copies == 2 and start // half % 2 == 0
        span = min(visibility.span or length, length)
        step = span * max(1, BLOCK_TOKENS // span)
        for first in range(0, length, step):
            last = min(first + step, length)
            queries = slice(start + first, start + last)
            clean = start + half * noised
            prefix, mask = slice(clean, clean + first), None
            near: tuple[slice, ...] = (queries,)
            if step > span:  # several chunks, each of which sees those before it
                if noised:
                    near = (slice(clean + first, clean + last), queries)
                keys = Tokens(*(torch.cat([column[keys] for keys in near]) for column in tokens))
                mask = visibility.sees(Tokens(*(column[queries].unsqueeze(1) for column in tokens)), keys)
            blocks.append(QueryBlock(queries, prefix, near, mask))
        start += length
    return blocks


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, documents: Documents, visibility: Visibility) -> Tensor:
    """`q` [B, T, H, d]; `k`, `v` [B, T, K, d] on the CPU, H a multiple of K. Returns [B, T, H, d]."""
    if documents.query_blocks is None:
        documents.query_blocks = plan_blocks(documents, visibility)
    group = q.shape[2] // k.shape[2]
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    flat = (x.flatten(0, 1).transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, H, N, d]
    return _BlockAttention.apply(*flat, documents.query_blocks).squeeze(0).transpose(0, 1).view_as(q)


class _BlockAttention(torch.autograd.Function):
    """[1, H, N, d] three times -> [1, H, N, d]. Backward runs each part again with the whole's output and log-sum-exp,
    which makes its probabilities those of the whole."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: list[QueryBlock]) -> Tensor:
        out = torch.empty_like(q)
        logsumexp = q.new_empty(q.shape[:3], dtype=_wide(q.dtype))
        for block in blocks:
            parts = [
                _forward(q[:, :, block.queries], keys, values, attn_mask=mask)
                for keys, values, mask in _parts(k, v, block, q.dtype)
            ]
            out[:, :, block.queries], logsumexp[:, :, block.queries] = _merged(parts)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        ctx.blocks = blocks
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, logsumexp = ctx.saved_tensors
        grads = [torch.zeros_like(x, dtype=_wide(x.dtype)) for x in (q, k, v)]
        grad_q, grad_k, grad_v = grads
        for block in ctx.blocks:
            rows = block.queries
            of_queries = [x[:, :, rows] for x in (grad, q, out, logsumexp)]
            for places, (keys, values, mask) in zip(_places(block), _parts(k, v, block, q.dtype), strict=True):
                g, queries, o, lse = of_queries
                dq, dk, dv = _backward(g, queries, keys, values, o, lse, 0.0, False, attn_mask=mask)
                grad_q[:, :, rows] += dq
                first = 0
                for place in places:
                    last = first + place.stop - place.start
                    grad_k[:, :, place] += dk[:, :, first:last]
                    grad_v[:, :, place] += dv[:, :, first:last]
                    first = last
        return *(x.to(q.dtype) for x in grads), None


def _places(block: QueryBlock) -> list[tuple[slice, ...]]:
    """Where the keys of each call of the kernel are; a prefix and an unmasked neighbourhood that touch are one call."""
    if block.prefix.start == block.prefix.stop:
        return [block.near]
    if block.mask is None and block.prefix.stop == block.near[0].start:
        return [(slice(block.prefix.start, block.near[0].stop),)]
    return [(block.prefix,), block.near]


def _parts(k: Tensor, v: Tensor, block: QueryBlock, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    parts = []
    for places in _places(block):
        keys, values = (
            torch.cat([x[:, :, p] for p in places], 2) if places[1:] else x[:, :, places[0]] for x in (k, v)
        )
        parts.append((keys, values, None if places != block.near else _additive(block.mask, dtype)))
    return parts


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The kernel's form of a mask: 0 where visible, -infinity elsewhere."""
    return None if mask is None else torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)


def _merged(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over the keys of all parts together."""
    if len(parts) == 1:
        return parts[0]
    (out1, lse1), (out2, lse2) = parts
    whole = torch.logaddexp(lse1, lse2)
    return torch.exp(lse1 - whole).unsqueeze(-1) * out1 + torch.exp(lse2 - whole).unsqueeze(-1) * out2, whole


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
