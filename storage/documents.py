"""Which rows hold a document: an index beside the shards of each source, DATA/<split>/documents-<source>.arrow.

It is made with the manifest, but no part of it: a data set without one answers the same, by reading every row. So is the file of
the pieces of rows (storage/pieces.py).
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from storage.atomic import new_stream
from storage.lookup import Lookup, Pairs, sorted_runs, write_lookup
from storage.manifest import Manifest, save_manifest, write_datasets_index
from storage.pieces import PieceWriter, pieces_schema
from storage.rows import SEGMENT_COLUMNS, TARGET_COLUMN, RowBlock
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
    """Write the index of a source and the file of its pieces, from its rows. Raises OSError where the folder refuses."""
    made_from = _shards_hash(dataset, source)
    schema = pieces_schema(made_from)
    with new_stream(dataset.piece_path(source), schema) as stream:
        pieces = PieceWriter(stream, schema)
        write_lookup(_index_file(dataset, source), made_from, _pairs(dataset, source, pieces.add))
        pieces.flush()


def is_indexed(dataset: ShardedDataset, source: str) -> bool:
    """Whether both files are there."""
    return _index(dataset, source) is not None and dataset.open_pieces(source) is not None


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


def index_problems(dataset: ShardedDataset, source: str, full: bool) -> Iterator[str]:
    """What is wrong with those of the two files that are there; `full`: their content is compared with the rows."""
    anew = "remove it (`python -m tools.ledger RUN --document N` makes it anew)"
    file, index = _index_file(dataset, source), _index(dataset, source)
    if file.exists() and index is None:
        yield f"{file} is damaged or of other shards: {anew}"
    if index and full and not _agrees(index, _pairs(dataset, source)):
        yield f"{file} does not say which rows hold which documents: {anew}"
    file, pieces = dataset.piece_path(source), dataset.open_pieces(source)
    if file.exists() and pieces is None:
        yield f"{file} is damaged or of other shards: {anew}"
    if pieces and full and not all(pieces.agrees(first, block) for first, block in dataset.blocks(source)):
        yield f"{file} does not say which documents rows hold: {anew}"


def _agrees(index: Lookup, pairs: Iterator[Pairs]) -> bool:
    """Is the index of these pairs? One run of them is held at a time."""
    checked = 0
    for run in sorted_runs(pairs):
        if checked == len(index.runs) or not all(map(np.array_equal, run, index.runs[checked])):
            return False
        checked += 1
        del run  # before the next is made
    return checked == len(index.runs)


def _index(dataset: ShardedDataset, source: str) -> Lookup | None:
    return Lookup.open(_index_file(dataset, source), _shards_hash(dataset, source))


def _index_file(dataset: ShardedDataset, source: str) -> Path:
    return dataset.directory / dataset.split / f"documents-{source}.arrow"


def _shards_hash(dataset: ShardedDataset, source: str) -> str:
    return dataset.manifest.splits[dataset.split][source].shards_hash


def _pairs(
    dataset: ShardedDataset, source: str, read: Callable[[RowBlock], None] = lambda block: None
) -> Iterator[Pairs]:
    """Document and row of every piece; a batch at a time. `read` gets each."""
    for first, block in dataset.blocks(source):
        read(block)
        yield block.seg_doc, np.repeat(np.arange(first, first + len(block.ids)), np.diff(block.splits))
