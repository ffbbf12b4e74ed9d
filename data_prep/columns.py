"""What the index step knows of each document of all units, in files that are mapped: its memory does not grow with them.

Columns are read `LOOKED_AT` documents at a time. What has to be brought together from all of them, such as equal texts, is first
shared out by its hash among files of about `PART_DOCUMENTS`, each of which is sorted by itself.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from data_prep.ledger import unit_path

LOOKED_AT, PART_DOCUMENTS = 1 << 20, 1 << 21
MOST_SOURCES = 1 << 16
TEXT = np.dtype([("hash", np.uint64, 2), ("nbytes", np.int64), ("doc", np.int64)])


class Columns(NamedTuple):
    """Per document of all units, in order."""

    length: np.ndarray  # int64
    nbytes: np.ndarray  # int64
    source: np.ndarray  # uint16
    key_hash: np.ndarray  # uint64
    text_hash: np.ndarray  # uint64 [N, 2]


class GrowingColumn:
    """A column that is written in pieces, and mapped when it is whole."""

    def __init__(self, path: Path, kind: str) -> None:
        self.path, self.kind = path, np.dtype(kind)
        self._file = path.open("wb")

    def add(self, values: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(values, self.kind).data)

    def mapped(self) -> np.ndarray:
        """All of it, to read and to change; nothing more can be added."""
        self._file.close()
        return mapped_column(self.path, self.kind)


def mapped_column(path: Path, kind: np.dtype | str) -> np.ndarray:
    """A column that was written before."""
    return np.asarray(np.memmap(path, kind, "r+")) if path.stat().st_size else np.zeros(0, kind)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A new folder that is gone afterwards."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def blocks(first: int, end: int) -> Iterator[slice]:
    """Documents that are looked at together, of those from `first` to `end` (exclusive)."""
    for start in range(first, end, LOOKED_AT):
        yield slice(start, min(start + LOOKED_AT, end))


def read_columns(
    folder: Path, unit_sources: Sequence[int], names: list[str], scratch: Path
) -> tuple[Columns, list[str]]:
    """Everything but tokens and keys, of all units, and the sources by their numbers: `names`, of which unit u's is number
    `unit_sources[u]`, or those that the documents have, in the order of the alphabet. Raises ValueError for too many."""
    kinds = "int64", "int64", "uint16", "uint64", "uint64"
    columns = [GrowingColumn(scratch / name, kind) for name, kind in zip(Columns._fields, kinds, strict=True)]
    found: dict[str, int] = {}
    for unit, source in enumerate(unit_sources):
        with pa.memory_map(str(unit_path(folder, unit))) as file, pa.ipc.open_stream(file) as stream:
            for batch in stream:
                lengths = np.diff(batch["tokens"].offsets.to_numpy())
                sources = np.full(len(lengths), source, np.uint16)
                if "source" in batch.schema.names:
                    own = batch["source"].dictionary_encode()
                    numbers = [found.setdefault(name, len(found)) for name in own.dictionary.to_pylist()]
                    if len(found) > MOST_SOURCES:
                        raise ValueError(
                            f"--source-field names more than {MOST_SOURCES:,} sources: choose another field"
                        )
                    sources = np.array(numbers, np.uint16)[own.indices.to_numpy()]
                text_hash = np.frombuffer(batch["text_hash"].buffers()[1], np.uint64)
                parts = lengths, batch["nbytes"].to_numpy(), sources, batch["key_hash"].to_numpy(), text_hash
                for column, part in zip(columns, parts, strict=True):
                    column.add(part)
    whole = Columns._make(column.mapped() for column in columns)
    whole = whole._replace(text_hash=whole.text_hash.reshape(-1, 2))
    if not found:
        return whole, names
    ordered = sorted(found)
    place = np.empty(len(found), np.uint16)
    place[[found[name] for name in ordered]] = np.arange(len(found))
    for block in blocks(0, len(whole.source)):
        whole.source[block] = place[whole.source[block]]
    return whole, ordered


def find_duplicates(columns: Columns, scratch: Path) -> tuple[np.ndarray, np.ndarray]:
    """Documents whose text an earlier document has (equal 128-bit hashes and equal sizes), and the first that has it."""
    documents = len(columns.length)
    first_column = GrowingColumn(scratch / "first", "int64")
    for block in blocks(0, documents):
        first_column.add(np.full(block.stop - block.start, -1))
    first = first_column.mapped()
    for path in _by_text(columns, scratch):
        texts = np.zeros(0, TEXT)
        for part in _pieces(path):
            texts = np.concatenate([texts, part])
            later, earlier = equal_texts(texts["hash"], texts["nbytes"])
            first[texts["doc"][later]] = texts["doc"][earlier]
            texts = np.delete(texts, later)
        path.unlink()
    found = GrowingColumn(scratch / "duplicates", "int64"), GrowingColumn(scratch / "originals", "int64")
    for block in blocks(0, documents):
        mine = np.flatnonzero(first[block] >= 0)
        found[0].add(block.start + mine)
        found[1].add(first[block][mine])
    return found[0].mapped(), found[1].mapped()


def equal_texts(text_hash: np.ndarray, nbytes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of texts that an earlier one is equal to, ascending, and of the first that each is equal to."""
    hashes = np.sort(text_hash[:, 0])
    again = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if not len(again):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    place = np.searchsorted(again, text_hash[:, 0]).clip(max=len(again) - 1)
    possible = np.flatnonzero(again[place] == text_hash[:, 0])
    later, earlier = _equal_among(text_hash[possible], nbytes[possible])
    return possible[later], possible[earlier]


def _equal_among(text_hash: np.ndarray, nbytes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort((text_hash[:, 1], text_hash[:, 0]))  # stable: document order within equals
    same = np.all(text_hash[order[1:]] == text_hash[order[:-1]], axis=1)
    same &= nbytes[order[1:]] == nbytes[order[:-1]]
    first = np.maximum.accumulate(np.where(np.append(True, ~same), np.arange(len(order)), 0)) if len(order) else order
    duplicates, originals = order[1:][same], order[first[1:]][same]
    by_number = np.argsort(duplicates)
    return duplicates[by_number], originals[by_number]


def _by_text(columns: Columns, scratch: Path) -> list[Path]:
    """Files of TEXT, each with all documents, in their order, whose hash is in a part of all hashes."""
    parts = -(-len(columns.length) // PART_DOCUMENTS)
    paths = [scratch / f"texts-{part:05d}" for part in range(parts)]
    for block in blocks(0, len(columns.length)):
        part = ((columns.text_hash[block, 0] >> np.uint64(32)) * np.uint64(parts)) >> np.uint64(32)
        order = np.argsort(part, kind="stable")
        texts = np.empty(len(order), TEXT)
        texts["hash"], texts["nbytes"] = columns.text_hash[block][order], columns.nbytes[block][order]
        texts["doc"] = block.start + order
        ends = np.searchsorted(part[order], np.arange(parts - 1, dtype=np.uint64), side="right")
        for path, mine in zip(paths, np.split(texts, ends), strict=True):
            with path.open("ab") as file:
                file.write(mine.data)
    return paths


def _pieces(path: Path) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        while len(piece := np.fromfile(file, TEXT, 2 * PART_DOCUMENTS)):
            yield piece


def smallest_by_source(source: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sources that occur, and the position of the first of the smallest values of each."""
    smallest = np.full(int(source.max(initial=-1)) + 1, np.iinfo(values.dtype).max, values.dtype)
    np.minimum.at(smallest, source, values)
    places = np.flatnonzero(values == smallest[source])
    sources, first = np.unique(source[places], return_index=True)
    return sources, places[first]
