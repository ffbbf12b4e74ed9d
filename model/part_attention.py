"""Attention of the queries of some columns over the keys that they see, gathered from wherever these are.

Legend: B batch, T tokens of a row, t of them here, N = B T flattened, m keys that some query here sees, H query heads,
K key/value heads, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from .block_attention import among, attend_planned, plan_blocks
from .documents import Documents, QueryBlock
from .segments import Segment
from .visibility import Visibility


@dataclass
class RowPart:
    """The queries that are here, and what they see of all N tokens."""

    segments: list[Segment]
    seen: Tensor
    """bool [N] on the CPU, m of them true: the keys, in this order."""
    query_blocks: list[QueryBlock] | None = field(default=None, repr=False)
    """Made at the first layer of a forward, for all of them."""


def attend_part(q: Tensor, k: Tensor, v: Tensor, documents: Documents, visibility: Visibility, part: RowPart) -> Tensor:
    """`q` [B, t, H, d] of `documents.columns`; `k`, `v` [m, K, d] of the tokens that are seen. Returns [B, t, H, d]."""
    if part.query_blocks is None:
        part.query_blocks = among(plan_blocks(documents, visibility, documents.columns), part.seen)
    return attend_planned(q.flatten(0, 1), k, v, part.query_blocks).view_as(q)
