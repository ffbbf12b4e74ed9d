"""Rows of a data set, in bounded memory and several processes: what `pack` and `write_split` make of all documents at once.

choose   each group of documents (data_prep/pack.py) is packed by itself; its rows are kept in files until all are written
write    each shard by itself, from the groups that its rows are in
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.columns import blocks
from data_prep.cut import Breaks, count_cuts, structure_windows
from data_prep.pack import (
    GROUP_TOKENS,
    Packing,
    RowCounts,
    concat_groups,
    group_rows,
    pack_group,
    pack_stretch,
    write_split,
)
from data_prep.store import SPLITS, StoredDocuments, TokenStore
from data_prep.targets import Spans, joined
from data_prep.token_bytes import token_bytes
from data_prep.tokenizer import Tokenizer, open_tokenizer
from data_prep.units.pool import done_by
from storage.manifest import PackingPolicy, Shard
from storage.shards import ShardWriter

PIECES = "piece_off", "piece_len", "piece_ctx"


class RowJob(NamedTuple):
    """What every process needs to choose and write rows."""

    output: Path
    tokens: Path
    scratch: Path
    tokenizer: Path
    policy: PackingPolicy
    seed: int
    targets: bool
    """Only some tokens of the documents carry loss."""
    plan_sha256: str
    group_tokens: int = GROUP_TOKENS
    rows_per_shard: int | None = None


class DocumentGroup(NamedTuple):
    """The documents of a split and source among those from `first` to `end` (exclusive), packed by themselves; where all are
    one stream (concat), those that a stretch of it has tokens of."""

    split: str
    source: str
    number: int
    first: int
    end: int
    before: int = 0
    """Tokens of the stream before its documents, and of the whole stream."""
    total: int = 0


class ShardRows(NamedTuple):
    """Rows `first` to `end` (exclusive) of some groups of a split and source, a shard of their own."""

    split: str
    source: str
    number: int
    first: int
    end: int
    groups: list[tuple[DocumentGroup, int]]
    """With the rows of each."""


def groups_of(store: TokenStore, split: str, source: str, job: RowJob) -> Iterator[DocumentGroup]:
    """In the order of their documents."""
    if job.policy.policy == "concat":
        yield from _stretches(store, split, source, job)
        return
    tokens, number, first = 0, 0, None
    before = np.int64(-1)
    for block in blocks(0, len(store)):
        part = store.documents(split, source, block.start, block.stop)
        ends = tokens + np.cumsum(part.length)
        group = ends // job.group_tokens
        for place in np.flatnonzero(np.diff(group, prepend=before)).tolist():
            if first is not None:
                yield DocumentGroup(split, source, number, first, int(part.doc[place]))
                number += 1
            first = int(part.doc[place])
        if len(part):
            tokens, before = int(ends[-1]), group[-1]
    if first is not None:
        yield DocumentGroup(split, source, number, first, len(store))


def _stretches(store: TokenStore, split: str, source: str, job: RowJob) -> Iterator[DocumentGroup]:
    span = group_rows(job.policy, job.group_tokens) * job.policy.seq_length
    firsts, total = list[tuple[int, int]](), 0  # documents with the first tokens of groups, and the tokens before each
    for block in blocks(0, len(store)):
        part = store.documents(split, source, block.start, block.stop)
        ends = total + np.cumsum(part.length)
        total += int(part.length.sum())
        place = np.searchsorted(ends, np.arange(len(firsts) * span, total, span), side="right")
        firsts += zip(part.doc[place].tolist(), (ends - part.length)[place].tolist(), strict=True)
    groups = concat_groups(total, job.policy, job.group_tokens) if total else 0
    for number, (first, before) in enumerate(firsts[:groups]):
        end = firsts[number + 1][0] + 1 if number + 1 < groups else len(store)
        yield DocumentGroup(split, source, number, first, end, before, total)


class RowMaker:
    """Chooses and writes rows, in one of the processes."""

    def __init__(self, job: RowJob) -> None:
        self.job, self.store = job, TokenStore.open(job.tokens)
        self.tokenizer: Tokenizer = open_tokenizer(job.tokenizer)
        self.breaks = Breaks(token_bytes(self.tokenizer))

    def choose(self, group: DocumentGroup) -> tuple[RowCounts, dict[str, int]]:
        """Keep a group's rows in its folder; returns what they are, and the cuts of each kind."""
        job, policy = self.job, self.job.policy
        documents, own = self.store.documents(group.split, group.source, group.first, group.end), slice(None)
        if policy.policy == "concat":
            stretch = group.number, job.group_tokens, group.before, group.total
            packing, own = pack_stretch(documents.length, policy, job.seed, *stretch)
        else:
            windows = structure_windows(documents, policy, self.breaks) if policy.cut == "structure" else None
            packing = pack_group(documents.length, policy, job.seed, group.number, windows)
        target_bytes = 0
        if job.targets:
            spans, sizes = documents.targets()
            packing, target_bytes = packing.with_targets(spans), int(sizes[own].sum())
        cuts = count_cuts(documents, packing.piece_doc, packing.piece_off + packing.piece_len, self.breaks)
        folder = self._folder(group)
        folder.mkdir(parents=True, exist_ok=True)
        columns = {"row_splits": packing.row_splits, "doc": documents.doc[packing.piece_doc]}
        columns |= {name: getattr(packing, name) for name in PIECES}
        if packing.piece_targets is not None:
            columns |= packing.piece_targets._asdict()
        for name, values in columns.items():
            np.save(folder / f"{name}.npy", values)
        return (
            RowCounts(
                documents=len(documents.doc[own]),
                bytes=int(documents.nbytes[own].sum()),
                tokens=int(documents.length[own].sum()),
                target_bytes=target_bytes,
                rows=packing.rows,
                row_tokens=packing.rows * packing.row_tokens,
                padding=packing.padding,
                targets=packing.targets,
                documents_cut=packing.documents_cut,
                documents_cut_though_fitting=packing.documents_cut_though_fitting,
                tokens_dropped=packing.tokens_dropped,
            ),
            cuts,
        )

    def write(self, rows: ShardRows) -> Shard:
        """Write one shard."""
        job = self.job
        packing, doc = self._rows(rows)
        writer = shard_writer(job, rows.split, rows.source, str(self.store.dtype), rows.number)
        (shard,) = write_split(StoredDocuments(self.store, doc), packing, writer, self.tokenizer.pad_id)
        return shard

    def _rows(self, wanted: ShardRows) -> tuple[Packing, np.ndarray]:
        """The shard's rows, and the number of the document that each of their pieces is cut from."""
        parts: list[dict[str, np.ndarray]] = []
        spans: list[Spans] = []
        splits, start = [np.zeros(1, np.int64)], 0
        for group, count in wanted.groups:
            low, high = max(wanted.first - start, 0), min(wanted.end - start, count)
            start += count
            if low >= high:
                continue
            folder = self._folder(group)
            edges = np.array(np.load(folder / "row_splits.npy", mmap_mode="r")[low : high + 1])
            mine = slice(int(edges[0]), int(edges[-1]))
            splits.append(edges[1:] - edges[0] + splits[-1][-1])
            parts.append({name: _part(folder, name, mine) for name in ("doc", *PIECES)})
            if self.job.targets:
                own = _part(folder, "splits", slice(mine.start, mine.stop + 1))
                held = slice(int(own[0]), int(own[-1]))
                spans.append(Spans(own - own[0], _part(folder, "begin", held), _part(folder, "end", held)))
        doc, *pieces = (np.concatenate([part[name] for part in parts]) for name in ("doc", *PIECES))
        numbers = np.arange(len(doc))
        off, length, ctx = pieces
        targets = joined(spans) if self.job.targets else None
        width, row_splits = self.job.policy.row_tokens, np.concatenate(splits)
        return Packing(width, row_splits, numbers, off, length, ctx, 0, 0, 0, targets), doc

    def _folder(self, group: DocumentGroup) -> Path:
        return self.job.scratch / f"{group.split}-{group.source}-{group.number}"


def _part(folder: Path, name: str, mine: slice) -> np.ndarray:
    return np.array(np.load(folder / f"{name}.npy", mmap_mode="r")[mine])


def shard_writer(job: RowJob, split: str, source: str, dtype: str, first_shard: int = 0) -> ShardWriter:
    width, metadata = job.policy.row_tokens, {"plan": job.plan_sha256}
    place = job.output, split, source, width, dtype
    return ShardWriter(*place, metadata, job.rows_per_shard, job.targets, first_shard)


def choose_rows(
    job: RowJob, workers: int, advance: Callable[[int], None]
) -> Iterator[tuple[DocumentGroup, RowCounts, dict[str, int]]]:
    """Every group, split by split and source by source, with what `RowMaker.choose` says of it; `advance`: by its tokens."""
    store = TokenStore.open(job.tokens)
    groups = [g for split in SPLITS for source in store.sources for g in groups_of(store, split, source, job)]
    tasks = [("choose", group) for group in groups]
    for group, (counts, cuts) in zip(groups, done_by(RowMaker, job, tasks, workers), strict=True):
        advance(counts.tokens)
        yield group, counts, cuts


def write_rows(
    job: RowJob, chosen: list[tuple[DocumentGroup, RowCounts]], workers: int, advance: Callable[[int], None]
) -> dict[tuple[str, str], list[Shard]]:
    """The shards of every split and source; `advance`: by the rows of each."""
    dtype, rows = str(TokenStore.open(job.tokens).dtype), dict[tuple[str, str], list[tuple[DocumentGroup, int]]]()
    for group, counts in chosen:
        rows.setdefault(group[:2], []).append((group, counts.rows))
    tasks: list[tuple[str, ShardRows]] = []
    for (split, source), groups in rows.items():
        step, count = shard_writer(job, split, source, dtype).shard_rows, sum(n for _, n in groups)
        ends = list(accumulate(n for _, n in groups))
        for number, first in enumerate(range(0, count, step)):
            last = min(first + step, count)
            mine = slice(bisect_right(ends, first), bisect_left(ends, last) + 1)
            before = ends[mine.start - 1] if mine.start else 0
            tasks.append(("write", ShardRows(split, source, number, first - before, last - before, groups[mine])))
    shards: dict[tuple[str, str], list[Shard]] = {key: [] for key in rows}
    for (_, task), shard in zip(tasks, done_by(RowMaker, job, tasks, workers), strict=True):
        shards[task[:2]].append(shard)
        advance(shard.rows)
    return shards
