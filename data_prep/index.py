"""The index step of a build: what is left out, and every document's split, by document order and hash only.

Whatever the number of documents, and of those left out, it needs the memory of a part of them (columns.py, dropped.py).
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import JsonValue

from console.progress import say
from data_prep.columns import (
    Columns,
    GrowingColumn,
    blocks,
    find_duplicates,
    read_columns,
    scratch_folder,
    smallest_by_source,
)
from data_prep.dropped import Dropped, kept_in, read_dropped, write_dropped
from data_prep.duplicates.contamination import CONTAMINATED
from data_prep.leave_out import cut_columns, dropped_statistics, find_contaminated, find_dropped, merged
from data_prep.ledger import Ledger, filtered_of
from data_prep.options import BuildOptions
from data_prep.plan import TOKENS_FOLDER
from data_prep.sources import key_prefix
from data_prep.store import LEFT_OUT, SPLITS, write_index
from data_prep.summary import StoredNumbers
from data_prep.tokenizer import Tokenizer
from storage.manifest import LeftOutFiles

INDEX_FOLDER = "index.tmp"


class Tokenized(NamedTuple):
    """What is known of the complete token store in an output folder."""

    ledgers: list[Ledger]
    unit_sources: list[int]
    inputs: dict[str, str]
    created_by: dict[str, str]
    left_out: dict[str, LeftOutFiles]
    foreseen: dict[str, JsonValue]
    """What an export of the tokenizer will not keep as it is (data_prep/foresee.py)."""
    repacked_from: str | None = None
    dropped: Path | None = None
    """Folder of the token store that lists what is left out, where that was decided before."""


class Indexed(NamedTuple):
    """What the index step found."""

    numbers: StoredNumbers
    dropped: dict[str, JsonValue]
    """`leave_out.dropped_statistics`"""


def index_store(
    options: BuildOptions, sources: list[str], tokenizer: Tokenizer, made: Tokenized, output: Path, workers: int
) -> Indexed:
    """Decide what is left out and every document's split (a position in SPLITS, or LEFT_OUT); write the store's index.

    Raises ValueError where a split would hold nothing.
    """
    tokens = output / TOKENS_FOLDER
    with scratch_folder(output / INDEX_FOLDER) as scratch:
        columns, names = read_columns(tokens, made.unit_sources, sources, scratch)
        duplicates, originals = find_duplicates(columns, scratch)
        decided = made.dropped
        if decided is None:
            exact = duplicates, originals
            found = find_dropped(options, tokenizer, output, made.ledgers, columns, exact, workers, scratch)
        else:
            found = (rows.select(rows.reason != CONTAMINATED) for rows in read_dropped(decided))
        dropped = kept_in(scratch / "dropped", found)
        split = _split_by_hash(columns, options.validation_fraction, scratch)
        _leave_out(split, dropped, columns)
        if not sum(_counts(split)[:LEFT_OUT]):
            filtered = sum(1 for _ in filtered_of(tokens))
            words = f", {filtered} left out by --filter" if filtered else ""
            raise ValueError(
                f"the input holds no text: {sum(ledger.empty for ledger in made.ledgers)} empty documents{words}"
            )
        if options.validation_fraction > 0:
            _fill_validation(columns, split, names)
        if options.decontaminate is not None:
            if decided is None:
                places = output, scratch / "split"
                found = find_contaminated(options, tokenizer, *places, made.ledgers, dropped, workers, scratch)
            else:
                found = (rows.select(rows.reason == CONTAMINATED) for rows in read_dropped(decided))
            contaminated = kept_in(scratch / "contaminated", found)
            _leave_out(split, contaminated, columns)
            dropped = kept_in(scratch / "all", merged(dropped, contaminated, columns.length))
            if not _counts(split)[0]:
                raise ValueError(f"--decontaminate {options.decontaminate} leaves no document for training")
        cut_columns(columns, dropped)
        write_dropped(tokens, dropped.pieces())
        prefixes = [key_prefix(options.seed, name) for name in sources]
        keys = write_index(tokens, columns, split, [ledger.documents for ledger in made.ledgers], names, prefixes)
        repeated = len(split) - keys.distinct()
        return Indexed(_numbers(columns, split, repeated, len(duplicates)), dropped_statistics(dropped))


def _split_by_hash(columns: Columns, validation_fraction: float, scratch: Path) -> np.ndarray:
    column, limit = GrowingColumn(scratch / "split", "uint8"), np.uint64(int(validation_fraction * 2**64))
    for block in blocks(0, len(columns.key_hash)):
        column.add(columns.key_hash[block] < limit)
    return column.mapped()


def _leave_out(split: np.ndarray, dropped: Dropped, columns: Columns) -> None:
    for rows in dropped.pieces():
        split[rows.doc[rows.whole(columns.length)]] = LEFT_OUT


def _counts(split: np.ndarray) -> list[int]:
    """Documents of each split, and those left out."""
    counts = [np.bincount(split[block], minlength=LEFT_OUT + 1) for block in blocks(0, len(split))]
    return np.sum(counts, axis=0).tolist() if counts else [0] * (LEFT_OUT + 1)


def _fill_validation(columns: Columns, split: np.ndarray, names: list[str]) -> None:
    """A source of few documents may have none with a small enough hash: its smallest one is taken, and said."""
    counts = np.zeros((len(names), len(SPLITS)), np.int64)
    best, picked = np.full((2, len(names)), 2**64 - 1, np.uint64), np.full((2, len(names)), -1)
    for block in blocks(0, len(split)):
        mine = np.flatnonzero(split[block] != LEFT_OUT)
        source, hashes = columns.source[block][mine].astype(np.int64), columns.key_hash[block][mine]
        np.add.at(counts, (source, split[block][mine]), 1)
        for side, values in enumerate((hashes, ~hashes)):  # the smallest hash, and the largest
            found, place = smallest_by_source(source, values)
            better = (values[place] < best[side, found]) | (picked[side, found] < 0)
            best[side, found[better]], picked[side, found[better]] = (
                values[place[better]],
                block.start + mine[place[better]],
            )
    for number, name in enumerate(names):
        for side, wanted in enumerate((1, 0)):
            if counts[number].sum() >= 2 and not counts[number, wanted]:
                split[picked[side, number]] = wanted
                counts[number, wanted], counts[number, 1 - wanted] = 1, counts[number, 1 - wanted] - 1
                many = counts[number].sum()
                say(f"{name}: one of its {many} documents was put into {SPLITS[wanted]}, which had none by hash")
    for wanted, words in ((1, "validation; --validation-fraction 0 does without"), (0, "training")):
        if not counts[:, wanted].any():
            raise ValueError(f"{len(split)} document(s) leave none for {words}")


def _numbers(columns: Columns, split: np.ndarray, repeated_keys: int, duplicates: int) -> StoredNumbers:
    lengths, counts, nbytes = np.zeros(0, np.int64), np.zeros(0, np.int64), 0
    for block in blocks(0, len(split)):
        kept = split[block] != LEFT_OUT
        found, times = np.unique(columns.length[block][kept], return_counts=True)
        lengths, place = np.unique(np.concatenate([lengths, found]), return_inverse=True)
        counts, before = np.zeros(len(lengths), np.int64), np.concatenate([counts, times])
        np.add.at(counts, place, before)
        nbytes += int(columns.nbytes[block][kept].sum())
    return StoredNumbers(lengths, counts, nbytes, repeated_keys, duplicates)
