"""Where the queries that are here lie, and which keys they see: the plan that every kernel over parts of rows is made from.

Legend: B batch, T tokens of a row, t of them here, N = B T flattened.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .documents import Documents
from .visibility import Visibility


class Segment(NamedTuple):
    """Consecutive queries of one document, of one copy of it where rows hold two."""

    queries: slice
    """Places in the flattened rows."""
    start: int
    """Where the document begins."""
    length: int
    clean: int
    """Where its clean copy begins: at `start`, unless this is the noised one."""


def segments(documents: Documents, columns: slice | Tensor = slice(None)) -> list[Segment]:
    """The queries of some columns, in their order: row by row, from left to right."""
    rows, size = len(documents.position_ids), sum(documents.lengths) // len(documents.position_ids)
    ends, found = list(accumulate(documents.lengths)), []
    runs = _runs(columns, size)
    for row in range(rows):
        for left, right in runs:
            begin, end = row * size + left, row * size + right
            number = bisect_right(ends, begin)
            while begin < end:
                length = documents.lengths[number]
                start, last = ends[number] - length, min(end, ends[number])
                noised = documents.copies == 2 and start % size < size // 2
                found.append(Segment(slice(begin, last), start, length, start + size // 2 * noised))
                begin, number = last, number + 1
    return found


def _runs(columns: slice | Tensor, tokens: int) -> list[tuple[int, int]]:
    """Runs of consecutive columns of a row: first and last + 1."""
    if isinstance(columns, slice):
        return [columns.indices(tokens)[:2]]
    edges = [0, *((columns.diff() != 1).nonzero().flatten() + 1).tolist(), len(columns)]
    return [(int(columns[i]), int(columns[j - 1]) + 1) for i, j in pairwise(edges)]


def keys_of(segment: Segment, visibility: Visibility) -> list[slice]:
    """The keys that some query of a segment sees: places in the flattened rows, in ascending order, none empty."""
    start, length, clean = segment.start, segment.length, segment.clean
    first, last = segment.queries.start - start, segment.queries.stop - start
    span = min(visibility.span or length, length)
    top = min(-(-last // span) * span, length)
    low = 0 if visibility.window is None else max(0, first - visibility.window + 1)
    if clean == start:
        return [slice(start + low, start + top)]
    earlier = (last - 1) // span * span
    found = [slice(start + first // span * span, start + top), slice(clean, clean + earlier)]
    return [keys for keys in found if keys.stop > keys.start]


def seen_keys(found: Iterable[Segment], visibility: Visibility, tokens: int) -> Tensor:
    """Which of the N tokens some query of the segments sees, bool [N] on the CPU."""
    seen = torch.zeros(tokens, dtype=torch.bool)
    for segment in found:
        for keys in keys_of(segment, visibility):
            seen[keys] = True
    return seen
