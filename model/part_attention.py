"""Attention of the queries of some columns over the keys that they see, gathered from wherever these are.

On CUDA the causal and the bidirectional mask go to variable-length flash attention, all else to FlexAttention; on CPUs
everything goes to blocks of flash attention (block_attention.py).

Legend: B batch, T tokens of a row, t of them here, N = B T flattened, m keys that some query here sees, H query heads,
K key/value heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from .attention import mask_of_blocks, run_flex, run_varlen, varlen_takes
from .block_attention import among, attend_planned, plan_blocks
from .documents import Documents, QueryBlock
from .segments import Segment, keys_of
from .visibility import Visibility


class VarlenCall(NamedTuple):
    """One call of the kernel: segments whose keys follow each other without a gap, as those of a stretch do."""

    queries: slice
    """Among the B t queries that are here."""
    keys: slice
    """Among the m keys that are here."""
    query_lengths: list[int]
    """Of each segment."""
    key_lengths: list[int]
    """Of each segment. The last query of a segment stands at its last key: the causal mask is aligned there, as
    FlashAttention aligns it since release 2.1."""


@dataclass
class RowPart:
    """The queries that are here, and what they see of all N tokens."""

    segments: list[Segment]
    seen: Tensor
    """bool [N] on the CPU, m of them true: the keys, in this order."""
    query_blocks: list[QueryBlock] | None = field(default=None, repr=False)
    """Made at the first layer of a forward, for all of them, as are these:"""
    varlen_calls: list[tuple[VarlenCall, Tensor, Tensor]] | None = field(default=None, repr=False)
    """With the places where segments begin among queries and among keys, int32 on the device."""
    block_mask: tuple[BlockMask, Tensor] | None = field(default=None, repr=False)
    """Of all N keys, and the places of those that are here."""


def attend_part(q: Tensor, k: Tensor, v: Tensor, documents: Documents, visibility: Visibility, part: RowPart) -> Tensor:
    """`q` [B, t, H, d] of `documents.columns`; `k`, `v` [m, K, d] of the tokens that are seen. Returns [B, t, H, d]."""
    flat = q.flatten(0, 1)
    if not q.is_cuda:
        if part.query_blocks is None:
            part.query_blocks = among(plan_blocks(documents, visibility, documents.columns), part.seen)
        return attend_planned(flat, k, v, part.query_blocks).view_as(q)
    if varlen_takes(q, documents, visibility):
        return _attend_varlen(flat, k, v, visibility, part).view_as(q)
    return attend_flex_part(flat, k, v, documents, visibility, part).view_as(q)


def plan_varlen(part: RowPart, visibility: Visibility) -> list[VarlenCall]:
    """The calls that attend all queries, in their order, with no key copied."""
    places = [0, *part.seen.cumsum(0).tolist()]
    calls: list[VarlenCall] = []
    here = 0
    for segment in part.segments:
        (keys,) = keys_of(segment, visibility)
        first, last = places[keys.start], places[keys.stop]
        length = segment.queries.stop - segment.queries.start
        if calls and calls[-1].keys.stop == first:
            call = calls.pop()
        else:
            call = VarlenCall(slice(here, here), slice(first, first), [], [])
        lengths = [*call.query_lengths, length], [*call.key_lengths, last - first]
        here += length
        calls.append(VarlenCall(slice(call.queries.start, here), slice(call.keys.start, last), *lengths))
    return calls


def _attend_varlen(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility, part: RowPart) -> Tensor:
    if part.varlen_calls is None:
        part.varlen_calls = [
            (call, _starts(call.query_lengths, q.device), _starts(call.key_lengths, q.device))
            for call in plan_varlen(part, visibility)
        ]
    out = [
        run_varlen(
            q[call.queries],
            k[call.keys],
            v[call.keys],
            (of_queries, max(call.query_lengths)),
            (of_keys, max(call.key_lengths)),
            visibility,
        )
        for call, of_queries, of_keys in part.varlen_calls
    ]
    return torch.cat(out)


def _starts(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def attend_flex_part(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, visibility: Visibility, part: RowPart
) -> Tensor:
    """`q` [B t, H, d]; the keys are put where they belong among all N, so that the compiled shapes stay the same."""
    if part.block_mask is None:
        tokens = documents.tokens()
        queries = torch.cat([torch.arange(each.queries.start, each.queries.stop) for each in part.segments])
        mask = mask_of_blocks(visibility, tokens.at(queries.to(q.device)), tokens)
        part.block_mask = mask, part.seen.nonzero().flatten().to(q.device)
    mask, places = part.block_mask
    k, v = (x.new_zeros(len(part.seen), *x.shape[1:]).index_copy(0, places, x) for x in (k, v))
    return run_flex(q, k, v, mask)
