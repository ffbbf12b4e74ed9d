"""Which rows hold a document: an index beside the shards of each source, DATA/<split>/documents-<source>.arrow.

It is made with the manifest, but no part of it: a data set without one answers the same, by reading every row.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from storage.lookup import Lookup, Pairs, sorted_runs, write_lookup
from storage.manifest import Manifest, save_manifest, write_datasets_index
from storage.rows import SEGMENT_COLUMNS, TARGET_COLUMN
from storage.shards import ShardedDataset


def write_manifest(directory: Path, manifest: Manifest) -> Manifest:
    """Finish a data set: the indexes of documents and of `datasets`, then the manifest; return it with its fingerprint."""
    for split in manifest.splits:
        dataset = ShardedDataset(directory, split, manifest)
        for source in dataset.sources:
            index_documents(dataset, source)
    write_datasets_index(directory, manifest, SEGMENT_COLUMNS, TARGET_COLUMN if manifest.target_spans else None)
    return save_manifest(directory, manifest)


def index_documents(dataset: ShardedDataset, source: str) -> None:
    """Write the index of a source, from its rows. Raises OSError where the folder refuses."""
    write_lookup(_index_file(dataset, source), shards_hash(dataset, source), _pairs(dataset, source))


def is_indexed(dataset: ShardedDataset, source: str) -> bool:
    return _index(dataset, source) is not None


def rows_of(dataset: ShardedDataset, source: str, document: int) -> list[int]:
    """The rows of a source that hold pieces of a document with this number, ascending."""
    if index := _index(dataset, source):
        return sorted(set(index.find(document)))
    found: set[int] = set()
    for documents, rows in _pairs(dataset, source):
        found |= set(rows[documents == document].tolist())
    return sorted(found)


def pieces_of(dataset: ShardedDataset, source: str, document: int) -> list[tuple[int, int, int]]:
    """Of a document of a source: row, offset in the document and length of each of its pieces, by their offsets."""
    found: list[tuple[int, int, int]] = []
    for number in rows_of(dataset, source, document):
        row = dataset.row(source, number)
        mine = row.seg_doc == document
        found += (
            (number, *piece) for piece in zip(row.seg_off[mine].tolist(), row.seg_len[mine].tolist(), strict=True)
        )
    return sorted(found, key=lambda piece: piece[1])


def index_problem(dataset: ShardedDataset, source: str, full: bool) -> str | None:
    """What is wrong with an index that is there; `full`: its content is compared with the rows."""
    file = _index_file(dataset, source)
    if not file.exists():
        return None
    index = _index(dataset, source)
    if index is None:
        return f"{file} is damaged or of other shards: remove it (`python -m tools.ledger` makes it anew)"
    if full:
        expected = list(sorted_runs(_pairs(dataset, source)))
        same = len(expected) == len(index.runs) and all(
            np.array_equal(ours, theirs)
            for run, found in zip(expected, index.runs, strict=True)
            for ours, theirs in zip(run, found, strict=True)
        )
        if not same:
            return f"{file} does not say which rows hold which documents: remove it (`python -m tools.ledger` makes it anew)"
    return None


def _index(dataset: ShardedDataset, source: str) -> Lookup | None:
    return Lookup.open(_index_file(dataset, source), shards_hash(dataset, source))


def _index_file(dataset: ShardedDataset, source: str) -> Path:
    return dataset.directory / dataset.split / f"documents-{source}.arrow"


def shards_hash(dataset: ShardedDataset, source: str) -> str:
    """By which an index knows the shards that it was made from."""
    shards = dataset.manifest.splits[dataset.split][source].shards
    return hashlib.sha256("".join(shard.sha256 for shard in shards).encode()).hexdigest()


def _pairs(dataset: ShardedDataset, source: str) -> Iterator[Pairs]:
    """Document and row of every piece; a batch at a time."""
    for first, block in dataset.blocks(source):
        yield block.seg_doc, np.repeat(np.arange(first, first + len(block.ids)), np.diff(block.splits))
