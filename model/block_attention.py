"""Attention over what is visible and nothing else: blocks of queries, each over the keys that it sees.

A block of queries sees a contiguous prefix of its document as a whole, and a neighbourhood of about its own size in part.
Queries may be those of some columns only, where devices share rows.
Both go through the flash kernel, and their results are merged by their log-sum-exps (Dao 2023, FlashAttention-2, 3.1),
so work follows the visible area, and no tensor is larger than the rows or a block.

Legend: B batch, T tokens of a row, N = B T flattened, n tokens of a document, H heads, d head width, b tokens of a block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .documents import Documents, QueryBlock
from .segments import Segment, segments
from .visibility import Tokens, Visibility

BLOCK_TOKENS = 128
"""Small chunks are put together to about this many queries: fewer calls, at the price of a mask that hides a part."""
LARGEST_BLOCK_TOKENS = 1024
"""The same where eight times as many keys are seen as a whole: the kernel is twice as fast on 768 queries and more."""

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def plan_blocks(
    documents: Documents, visibility: Visibility, columns: slice | Tensor = slice(None)
) -> list[QueryBlock]:
    """The blocks of some columns of a batch of rows, in the order of their queries."""
    tokens, blocks, here = documents.tokens(), [], 0
    for segment in segments(documents, columns):
        span = min(visibility.span or segment.length, segment.length)
        first, end = segment.queries.start, segment.queries.stop
        while first < end:
            step = span * max(1, _block_tokens(first - segment.start, visibility) // span)
            last = min(end, first + step - (first - segment.start) % step)  # chunks begin at multiples of their span
            queries, here = slice(here, here + last - first), here + last - first
            blocks.append(_block(segment._replace(queries=slice(first, last)), queries, span, visibility, tokens))
            first = last
    return blocks


def _block_tokens(earlier: int, visibility: Visibility) -> int:
    """How many queries to put together after so many tokens of their document."""
    size = BLOCK_TOKENS
    while size < LARGEST_BLOCK_TOKENS and min(earlier, visibility.window or earlier) >= 16 * size:
        size *= 2
    return size


def _block(part: Segment, queries: slice, span: int, visibility: Visibility, tokens: Tokens) -> QueryBlock:
    """What some queries of a document see; `queries` are their places among those that are here."""
    start, clean = part.start, part.clean
    first, last = part.queries.start - start, part.queries.stop - start
    if visibility.window is not None:
        whole = min(max(0, last - visibility.window), first)  # the first key that all of them see
        low = max(0, first - visibility.window + 1)
        prefix, near = slice(start + whole, start + first), [slice(start + low, start + whole), part.queries]
    else:
        base, top = first // span * span, min(-(-last // span) * span, part.length)
        prefix, near = slice(clean, clean + base), [slice(start + base, start + top)]
        if clean != start:
            near.insert(0, slice(clean + base, clean + (last - 1) // span * span))
    near = [keys for keys in near if keys.stop > keys.start]
    if last - first == 1 or (visibility.window is None and last <= base + span):  # one chunk, which sees all of itself
        return QueryBlock(queries, prefix, tuple(near), None)
    keys = Tokens(*(torch.cat([column[keys] for keys in near]) for column in tokens))
    mask = visibility.sees(Tokens(*(column[part.queries].unsqueeze(1) for column in tokens)), keys)
    return QueryBlock(queries, prefix, tuple(near), mask)


def among(blocks: list[QueryBlock], seen: Tensor) -> list[QueryBlock]:
    """The blocks with the places of keys counted among those that are `seen` (bool [N] on the CPU), which all of theirs are."""
    places = [0, *seen.cumsum(0).tolist()]
    moved = []
    for block in blocks:
        prefix, *near = (slice(places[keys.start], places[keys.stop]) for keys in (block.prefix, *block.near))
        moved.append(block._replace(prefix=prefix, near=tuple(near)))
    return moved


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, documents: Documents, visibility: Visibility) -> Tensor:
    """`q` [B, T, H, d]; `k`, `v` [B, T, K, d] on the CPU, H a multiple of K. Returns [B, T, H, d]."""
    if documents.query_blocks is None:
        documents.query_blocks = plan_blocks(documents, visibility)
    return attend_planned(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), documents.query_blocks).view_as(q)


def attend_planned(q: Tensor, k: Tensor, v: Tensor, blocks: list[QueryBlock]) -> Tensor:
    """`q` [n, H, d] of the queries that are here; `k`, `v` [m, K, d] of the keys that the blocks speak of."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    flat = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, H, n, d]
    return _BlockAttention.apply(*flat, blocks).squeeze(0).transpose(0, 1)


class _BlockAttention(torch.autograd.Function):
    """[1, H, n, d] and twice [1, H, m, d] -> [1, H, n, d]. Backward runs each part again with the whole's output and log-sum-exp,
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
