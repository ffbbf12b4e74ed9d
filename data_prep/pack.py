"""Stage two of data preparation: documents of any length become rows of exactly `row_tokens` tokens.

`pack` decides from lengths alone and is a pure function; `write_split` then copies tokens, one record batch in memory
at a time. Rows come out in a seeded order that is local: a shuffle never reaches further than GROUP_TOKENS, so the
documents behind neighbouring rows stay close together on disk.
"""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, pairwise, repeat
from typing import NamedTuple, Protocol

import numpy as np

from data_prep.cut import Windows, fixed_windows
from data_prep.targets import Spans
from storage.manifest import PackingPolicy, Shard
from storage.shards import RowBlock, ShardWriter

GROUP_TOKENS = 1 << 28


class PackedDocuments(Protocol):
    """What is packed: N documents in the token store, or anything like it."""

    doc: np.ndarray
    """Number of each document in the whole corpus, int64 [N]."""

    def tokens(self, i: int) -> np.ndarray:
        """Tokens of document `doc[i]`, uint16 or uint32 [its length]."""


@dataclass(frozen=True)
class Packing:
    """R rows made of P pieces of N documents; row r has the pieces row_splits[r]:row_splits[r + 1]."""

    row_tokens: int
    row_splits: np.ndarray  # int64 [R + 1]
    piece_doc: np.ndarray  # int64 [P], index into the documents that were packed
    piece_off: np.ndarray  # int64 [P]
    piece_len: np.ndarray  # int64 [P]
    piece_ctx: np.ndarray  # int64 [P]
    documents_cut: int
    """Documents of which no row holds the whole."""
    documents_cut_though_fitting: int
    """Those among them that are not longer than a row."""
    tokens_dropped: int
    """Tokens that are in no row."""
    piece_targets: Spans | None = None
    """Tokens of the documents that carry loss in each piece; None: all that may."""

    @property
    def rows(self) -> int:
        return len(self.row_splits) - 1

    @property
    def padding(self) -> int:
        """Tokens of padding in all rows together."""
        return self.rows * self.row_tokens - int(self.piece_len.sum())

    @property
    def targets(self) -> int:
        """Positions that carry loss: every token of a piece except its first and its context, or a part of these."""
        if self.piece_targets is not None:
            return self.piece_targets.tokens
        return int((self.piece_len - np.maximum(self.piece_ctx, 1)).sum())

    def with_targets(self, spans: Spans) -> "Packing":
        """The same rows, in which of the documents packed only these tokens carry loss."""
        first, end = self.piece_off + np.maximum(self.piece_ctx, 1), self.piece_off + self.piece_len
        return replace(self, piece_targets=spans.select(self.piece_doc).clip(first, end))


class RowCounts(NamedTuple):
    """What was chosen of a group, or of several."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    target_bytes: int = 0
    rows: int = 0
    row_tokens: int = 0
    padding: int = 0
    targets: int = 0
    documents_cut: int = 0
    documents_cut_though_fitting: int = 0
    tokens_dropped: int = 0


def total_of(counts: list[RowCounts]) -> RowCounts:
    return RowCounts(*map(sum, zip(*counts, strict=True))) if counts else RowCounts()


@dataclass(frozen=True)
class _Rows:
    """Pieces with the row each belongs to, before and after rows are put into their final order."""

    row: np.ndarray
    doc: np.ndarray
    off: np.ndarray
    len: np.ndarray
    ctx: np.ndarray

    def select(self, index: np.ndarray, row: np.ndarray) -> "_Rows":
        return _Rows(row[index], self.doc[index], self.off[index], self.len[index], self.ctx[index])


def pack(
    lengths: np.ndarray, row_tokens: int, policy: PackingPolicy, seed: int, windows: Windows | None = None
) -> Packing:
    """Distribute documents of `lengths` tokens (each >= 1) over rows.

    bestfit: a document longer than a row becomes windows, by default of fixed length (data_prep/cut.py); windows and
    short documents are then placed by best-fit decreasing, ties in document order (Ding et al. 2024, "Fewer
    Truncations Improve Language Modeling", section 3). At most one row of a group of GROUP_TOKENS tokens is less than
    half full; `tail: drop` leaves that one out. concat: all documents as one stream cut every `row_tokens - 1` tokens,
    the last token of a row being repeated as the first of the next; `tail: drop` leaves out the incomplete last row.
    """
    assert row_tokens == policy.row_tokens
    lengths = np.asarray(lengths, np.int64)
    assert not len(lengths) or lengths.min() >= 1
    if policy.policy == "bestfit":
        groups = _bestfit_groups(lengths, policy, windows or fixed_windows(lengths, policy))
    else:
        total = int(lengths.sum())
        numbers = range(concat_groups(total, policy, GROUP_TOKENS))
        groups = (_concat(lengths, policy, number, GROUP_TOKENS, 0, total) for number in numbers)
    return _packing(lengths, enumerate(groups), policy, seed)


def pack_group(
    lengths: np.ndarray, policy: PackingPolicy, seed: int, number: int, windows: Windows | None = None
) -> Packing:
    """The rows that `pack` makes of these documents where they are group `number` of all (policy bestfit)."""
    assert policy.policy == "bestfit"
    pieces = windows or fixed_windows(lengths, policy)
    group = _bestfit(_Rows(np.empty_like(pieces.doc), *pieces), policy)
    return _packing(lengths, [(number, group)], policy, seed)


def pack_stretch(
    lengths: np.ndarray, policy: PackingPolicy, seed: int, number: int, group_tokens: int, before: int, total: int
) -> tuple[Packing, slice]:
    """Those of `pack` that are group `number` of the rows of policy concat, and which of these documents count there.

    `lengths`: of all documents that the group's rows hold tokens of; `before`: tokens of those before them; `total`: of all.
    """
    span = group_rows(policy, group_tokens) * policy.seq_length
    last = number == concat_groups(total, policy, group_tokens) - 1
    begins = before + np.cumsum(lengths) - lengths
    end = len(lengths) if last else int(np.searchsorted(begins, (number + 1) * span))
    own = slice(int(np.searchsorted(begins, number * span)), end)
    group = number, _concat(lengths, policy, number, group_tokens, before, total)
    packing = _packing(lengths, [group], policy, seed, own)
    rows = _concat_rows(total, policy)
    dropped = total - rows * policy.seq_length - bool(rows) if last and policy.tail == "drop" else 0
    return replace(packing, tokens_dropped=dropped), own


def _packing(
    lengths: np.ndarray,
    groups: Iterable[tuple[int, _Rows]],
    policy: PackingPolicy,
    seed: int,
    own: slice = slice(None),  # documents that are counted
) -> Packing:
    parts: list[_Rows] = []
    rows = 0
    for number, part in groups:
        count = int(part.row.max(initial=-1)) + 1
        place = rows + np.random.default_rng([seed, number]).permutation(count)
        row = place[part.row]
        parts.append(part.select(np.argsort(row, kind="stable"), row))
        rows += count
    row, doc, off, length, ctx = (
        np.concatenate([getattr(part, name) for part in parts] or [np.empty(0, np.int64)])
        for name in ("row", "doc", "off", "len", "ctx")
    )
    whole = np.zeros(len(lengths), bool)
    whole[doc[length == lengths[doc]]] = True
    cut = ~whole[own]
    return Packing(
        row_tokens=policy.row_tokens,
        row_splits=np.searchsorted(row, np.arange(rows + 1)),
        piece_doc=doc,
        piece_off=off,
        piece_len=length,
        piece_ctx=ctx,
        documents_cut=int(cut.sum()),
        documents_cut_though_fitting=int((cut & (lengths[own] <= policy.row_tokens)).sum()),
        tokens_dropped=int(lengths.sum()) - _distinct_tokens(doc, off, length) if policy.tail == "drop" else 0,
    )


def _distinct_tokens(doc: np.ndarray, off: np.ndarray, length: np.ndarray) -> int:
    order = np.lexsort((off + length, off, doc))
    doc, begin, end = doc[order], off[order], (off + length)[order]
    repeated = np.maximum(end[:-1] - begin[1:], 0)[doc[1:] == doc[:-1]]
    return int(length.sum() - repeated.sum())


def _bestfit_groups(lengths: np.ndarray, policy: PackingPolicy, windows: Windows) -> Iterator[_Rows]:
    group = np.cumsum(lengths) // GROUP_TOKENS
    limits = np.flatnonzero(np.diff(group, prepend=-1, append=group[-1:] + 1))
    pieces = _Rows(np.empty_like(windows.doc), *windows)
    for first, last in pairwise(np.searchsorted(windows.doc, limits)):
        yield _bestfit(pieces.select(np.arange(first, last), pieces.row), policy)


def _bestfit(part: _Rows, policy: PackingPolicy) -> _Rows:
    """The pieces of one group, placed."""
    by_size = np.argsort(-part.len, kind="stable")
    row = np.fromiter(_best_fit_decreasing(part.len[by_size], policy.row_tokens), np.int64, len(by_size))
    rows = part.select(by_size, np.empty(len(by_size), np.int64))
    fill = np.bincount(row, weights=rows.len)
    if policy.tail == "drop" and fill.min() < policy.row_tokens / 2:
        emptiest = int(fill.argmin())
        kept = np.flatnonzero(row != emptiest)
        rows, row = rows.select(kept, rows.row), row[kept] - (row[kept] > emptiest)
    return _Rows(row, rows.doc, rows.off, rows.len, rows.ctx)


def _best_fit_decreasing(sizes: np.ndarray, capacity: int) -> Iterator[int]:
    """For each of the sizes (in decreasing order) the row that it goes to: the one that it leaves least room in.

    Equal sizes are placed together: a row with room r takes r // size of them before the next row gets any, which is
    what placing them one by one would do.
    """
    rows_with_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of rows_with_room, ascending
    rows = 0
    for size, items in zip(*(column.tolist() for column in _runs(sizes)), strict=True):
        while items:
            at = bisect_left(rooms, size)
            if at < len(rooms):
                room = rooms[at]
                available = rows_with_room[room]
            else:
                room, available = capacity, list(range(rows, rows - (-items // (capacity // size))))
                rows += len(available)
            each = room // size
            taken = available[-items // each :]  # negative, rounded away from zero
            del available[-len(taken) :]
            if not available and at < len(rooms):
                del rows_with_room[room], rooms[at]
            rest = items % each if len(taken) * each > items else 0
            fully = taken[: len(taken) - bool(rest)]
            yield from fully if each == 1 else chain.from_iterable(repeat(row, each) for row in fully)
            yield from repeat(taken[-1], rest)
            _give_back(rows_with_room, rooms, room - each * size, fully)
            _give_back(rows_with_room, rooms, room - rest * size, taken[len(fully) :])
            items -= len(fully) * each + rest


def _runs(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    starts = np.flatnonzero(np.diff(sizes, prepend=-1))
    return sizes[starts], np.diff(starts, append=len(sizes))


def _give_back(rows_with_room: dict[int, list[int]], rooms: list[int], room: int, rows: list[int]) -> None:
    if room and rows:
        if room not in rows_with_room:
            rows_with_room[room] = []
            insort(rooms, room)
        rows_with_room[room] += rows


def group_rows(policy: PackingPolicy, group_tokens: int) -> int:
    return max(1, group_tokens // policy.seq_length)


def _concat_rows(total: int, policy: PackingPolicy) -> int:
    full, rest = divmod(max(total - 1, 0), policy.seq_length)
    return full if policy.tail == "drop" else full + bool(rest) or min(total, 1)


def concat_groups(total: int, policy: PackingPolicy, group_tokens: int) -> int:
    """Groups that so many tokens make, one at least."""
    return max(1, -(-_concat_rows(total, policy) // group_rows(policy, group_tokens)))


def _concat(
    lengths: np.ndarray, policy: PackingPolicy, number: int, group_tokens: int, before: int, total: int
) -> _Rows:
    """The pieces of one group, in the order of the stream; see `pack_stretch`."""
    ends = before + np.cumsum(lengths)
    starts = ends - lengths
    rows, first = _concat_rows(total, policy), number * group_rows(policy, group_tokens)
    begin = np.arange(first, min(first + group_rows(policy, group_tokens), rows)) * policy.seq_length
    end = np.minimum(begin + policy.row_tokens, total)
    first_doc = np.searchsorted(ends, begin, side="right")
    pieces = np.searchsorted(ends, end - 1, side="right") - first_doc + 1
    row = np.repeat(np.arange(len(begin)), pieces)
    doc = np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces - first_doc, pieces)
    off = np.maximum(begin[row] - starts[doc], 0)
    size = np.minimum(end[row], ends[doc]) - starts[doc] - off
    return _Rows(row, doc, off, size, (off > 0).astype(np.int64))


def write_split(
    documents: PackedDocuments,
    packing: Packing,
    writer: ShardWriter,
    pad_id: int,
    advance: Callable[[int], None] | None = None,
) -> list[Shard]:
    """Copy the packed documents' tokens into shards; `advance` is called with the rows of each batch written."""
    width, step = packing.row_tokens, writer.batch_rows
    with writer:
        for first in range(0, packing.rows, step):
            splits = packing.row_splits[first : first + step + 1]
            pieces = slice(splits[0], splits[-1])
            doc, off, size = (a[pieces] for a in (packing.piece_doc, packing.piece_off, packing.piece_len))
            before = np.cumsum(size) - size  # tokens of earlier pieces
            row = np.repeat(np.arange(len(splits) - 1), np.diff(splits))
            place = row * width + before - before[splits[:-1] - splits[0]][row]
            ids = np.full(((len(splits) - 1) * width), pad_id, writer.dtype)
            for i, source, length, target in zip(*(a.tolist() for a in (doc, off, size, place)), strict=True):
                ids[target : target + length] = documents.tokens(i)[source : source + length]
            writer.write(
                RowBlock(
                    ids=ids.reshape(-1, width),
                    splits=(splits - splits[0]).astype(np.int32),
                    seg_len=size.astype(np.int32),
                    seg_ctx=packing.piece_ctx[pieces].astype(np.int32),
                    seg_doc=documents.doc[doc],
                    seg_off=off,
                    **_row_targets(packing, first, step, place - row * width - off),
                )
            )
            if advance:
                advance(len(splits) - 1)
    return writer.shards


def _row_targets(packing: Packing, first: int, step: int, shift: np.ndarray) -> dict[str, np.ndarray]:
    """Columns of the rows first .. first + step - 1; `shift`: from a token's place in its document to that in the row, for
    each piece of them.
    """
    if packing.piece_targets is None:
        return {}
    pieces = packing.row_splits[first : first + step + 1]
    splits, begin, end = packing.piece_targets
    mine, counts = slice(splits[pieces[0]], splits[pieces[-1]]), np.diff(splits[pieces[0] : pieces[-1] + 1])
    spans = np.stack([begin[mine], end[mine]], axis=1) + np.repeat(shift, counts)[:, None]
    return {
        "target_splits": (splits[pieces] - splits[pieces[0]]).astype(np.int32),
        "target_spans": spans.astype(np.int32),
    }
