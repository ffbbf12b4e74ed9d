"""The token store: every document's ids, boundaries explicit, independent of the sequence length.

    DATA/tokens/unit-00000.arrow   documents of one unit of work, in input order (Arrow stream)
    DATA/tokens/unit-00000.json    its ledger: written after the unit is complete, so a unit without one does not exist
    DATA/tokens/index.arrow        one row per stored document of all units: length, bytes, source, split

    column    type                       per document
    tokens    large_list<uint16|uint32>  ids, BOS (where the tokenizer has one) and EOS included
    key       string                     id field or place in the input
    nbytes    int64                      UTF-8 bytes of the text
    key_hash  uint64                     decides the split
    text_hash fixed_size_binary(16)      finds exact duplicates

and where only a part of the tokens carries loss (conversations):

    targets       list<fixed_size_list<int64>[2]>  these tokens, from and to (exclusive), ascending
    target_bytes  int64                            UTF-8 bytes of their text

A document's number is its position over all units. Duplicates that are left out keep theirs.
"""

import json
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from data_prep.ledger import unit_path
from data_prep.targets import Spans, joined
from storage.atomic import publish
from storage.manifest import file_sha256

INDEX_FILE = "index.arrow"
SPLITS = ("train", "validation")
LEFT_OUT = len(SPLITS)  # the split number of a duplicate that was removed
OPEN_UNITS = 64
INDEX_SCHEMA = {"length": pa.int64(), "nbytes": pa.int64(), "source": pa.uint16(), "split": pa.uint8()}


class DocumentBatch(NamedTuple):
    ids: np.ndarray  # dtype of the store, [tokens]
    lengths: np.ndarray  # int64 [documents]
    keys: list[str]
    nbytes: list[int]
    key_hashes: list[int]
    text_hashes: list[bytes]
    targets: Spans | None = None
    target_bytes: list[int] | None = None


def unit_schema(dtype: np.dtype, targets: bool = False) -> pa.Schema:
    """Columns of a unit's file: one row a document, ids of this type."""
    tokens = pa.large_list(pa.field("item", pa.from_numpy_dtype(dtype), nullable=False))
    columns = {"tokens": tokens, "key": pa.string(), "nbytes": pa.int64()}
    columns |= {"key_hash": pa.uint64(), "text_hash": pa.binary(16)}
    if targets:
        columns |= {"targets": pa.list_(pa.list_(pa.int64(), 2)), "target_bytes": pa.int64()}
    return pa.schema(columns)


@contextmanager
def new_stream(path: Path, schema: pa.Schema) -> Iterator[pa.ipc.RecordBatchStreamWriter]:
    """Write an Arrow stream under a temporary name, then sync and rename it; after an error nothing is left."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            with pa.ipc.new_stream(file, schema) as stream:
                yield stream
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_unit(path: Path, dtype: np.dtype, batches: Iterator[DocumentBatch], targets: bool = False) -> tuple[str, int]:
    """Write a unit's documents, whose batches all say what their targets are, or none; returns the file's SHA-256 and size."""
    schema = unit_schema(dtype, targets)
    with new_stream(path, schema) as stream:
        for batch in batches:
            stream.write_batch(_record_batch(batch, schema))
    return file_sha256(path), path.stat().st_size


def _record_batch(batch: DocumentBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Columns straight from their buffers: `pa.array` would import pandas, in every worker."""
    kinds = {field.name: field.type for field in schema}
    keys = [key.encode() for key in batch.keys]
    rows = len(keys)

    def column(name: str, *buffers: bytes | np.ndarray, children: list[pa.Array] | None = None) -> pa.Array:
        length = len(batch.ids) if name == "ids" else rows
        kind = kinds["tokens"].value_type if name == "ids" else kinds[name]
        return pa.Array.from_buffers(kind, length, [None, *map(pa.py_buffer, buffers)], children=children)

    columns = [
        column("tokens", _offsets(batch.lengths, np.int64), children=[column("ids", batch.ids)]),
        column("key", _offsets([len(key) for key in keys], np.int32), b"".join(keys)),
        column("nbytes", np.array(batch.nbytes, np.int64)),
        column("key_hash", np.array(batch.key_hashes, np.uint64)),
        column("text_hash", b"".join(batch.text_hashes)),
    ]
    if batch.targets is not None:
        pairs = np.stack([batch.targets.begin, batch.targets.end], axis=1).reshape(-1)
        spans = pa.FixedSizeListArray.from_buffers(
            kinds["targets"].value_type, len(pairs) // 2, [None], children=[_int64(pairs)]
        )
        columns.append(column("targets", batch.targets.splits.astype(np.int32), children=[spans]))
        columns.append(column("target_bytes", np.array(batch.target_bytes, np.int64)))
    return pa.record_batch(columns, schema=schema)


def _int64(values: np.ndarray) -> pa.Array:
    return pa.Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(values)])


def _offsets(lengths: Sequence[int] | np.ndarray, dtype: type[np.integer]) -> np.ndarray:
    offsets = np.zeros(len(lengths) + 1, dtype)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


class Columns(NamedTuple):
    """Per document of all units, in order."""

    length: np.ndarray  # int64
    nbytes: np.ndarray  # int64
    source: np.ndarray  # uint16
    key_hash: np.ndarray  # uint64
    text_hash: np.ndarray  # uint64 [N, 2]


def read_columns(folder: Path, unit_sources: Sequence[int]) -> Columns:
    """Everything but tokens and keys, of all units; `unit_sources[u]` is the number of unit u's source."""
    parts: list[tuple] = []
    for unit, source in enumerate(unit_sources):
        with pa.memory_map(str(unit_path(folder, unit))) as file, pa.ipc.open_stream(file) as stream:
            for batch in stream:
                lengths = np.diff(batch["tokens"].offsets.to_numpy())
                text_hash = np.frombuffer(batch["text_hash"].buffers()[1], np.uint64).reshape(-1, 2)
                rest = (np.array(batch[name]) for name in ("nbytes", "key_hash"))
                nbytes, key_hash = rest
                parts.append((lengths, nbytes, np.full(len(lengths), source, np.uint16), key_hash, text_hash.copy()))
    if not parts:
        kinds = (np.int64, np.int64, np.uint16, np.uint64)
        return Columns._make([*(np.zeros(0, kind) for kind in kinds), np.zeros((0, 2), np.uint64)])
    return Columns(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def write_index(folder: Path, columns: Columns, split: np.ndarray, units: list[int], sources: list[str]) -> None:
    """`split[d]` is a position in SPLITS or LEFT_OUT; `units[u]` the number of documents in unit u."""
    metadata = {"units": json.dumps(units), "sources": json.dumps(sources)}
    schema = pa.schema(INDEX_SCHEMA, metadata)
    arrays = [columns.length, columns.nbytes, columns.source, split.astype(np.uint8)]
    with new_stream(folder / INDEX_FILE, schema) as stream:
        stream.write_batch(pa.record_batch([pa.array(array) for array in arrays], schema=schema))


class TokenStore:
    """Read access by memory map: opening reads no token."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        try:
            with pa.memory_map(str(self.folder / INDEX_FILE)) as file, pa.ipc.open_stream(file) as stream:
                index, metadata = stream.read_all(), stream.schema.metadata
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(f"{folder} is not a complete token store: {error}") from None
        columns = [index[name].to_numpy() for name in INDEX_SCHEMA]
        self._length, self._nbytes, self._source, self._split = columns
        self.sources: list[str] = json.loads(metadata[b"sources"])
        self._unit_ends: list[int] = np.cumsum(json.loads(metadata[b"units"]), dtype=np.int64).tolist()
        self._open: OrderedDict[int, _UnitFile] = OrderedDict()

    @classmethod
    def open(cls, folder: str | Path) -> "TokenStore":
        return cls(Path(folder))

    def __len__(self) -> int:
        return len(self._length)

    @property
    def dtype(self) -> np.dtype:
        return self._unit(0).dtype

    def documents(self, split: str, source: str | None = None) -> "StoredDocuments":
        """The documents of a split (of one source), in input order."""
        chosen = self._split == SPLITS.index(split)
        if source is not None:
            chosen &= self._source == self.sources.index(source)
        return StoredDocuments(self, np.flatnonzero(chosen))

    def tokens(self, doc: int) -> np.ndarray:
        """Ids of document number `doc`: a view into the file."""
        unit, row = self._place(doc)
        return self._unit(unit).tokens(row)

    def targets(self, docs: np.ndarray) -> tuple[Spans, np.ndarray]:
        """Which tokens of the documents `docs` (ascending) carry loss, and int64 [documents] the bytes of their text.

        Raises ValueError where the store does not say it.
        """
        found = []
        for unit, (start, end) in enumerate(pairwise([0, *self._unit_ends])):
            mine = docs[np.searchsorted(docs, start) : np.searchsorted(docs, end)] - start
            if len(mine):
                found.append(self._unit(unit).targets(mine))
        return joined([spans for spans, _ in found]), np.concatenate([nbytes for _, nbytes in found])

    def key(self, doc: int) -> str:
        unit, row = self._place(doc)
        return self._unit(unit).key(row)

    def find(self, key: str) -> int | None:
        """Number of the first document with this key; reads the keys of all units up to it."""
        start = 0
        for unit, end in enumerate(self._unit_ends):
            row = self._unit(unit).find(key)
            if row is not None:
                return start + row
            start = end
        return None

    @property
    def units(self) -> list[tuple[int, int]]:
        """Number of documents and number of the source (0 if there are none) of each unit."""
        starts = [0, *self._unit_ends]
        return [(end - start, int(self._source[start]) if end > start else 0) for start, end in pairwise(starts)]

    def split(self, doc: int) -> str | None:
        """Split of a document, None for a removed duplicate."""
        number = int(self._split[doc])
        return None if number == LEFT_OUT else SPLITS[number]

    def source(self, doc: int) -> str:
        return self.sources[int(self._source[doc])]

    def _place(self, doc: int) -> tuple[int, int]:
        if not 0 <= doc < len(self):
            raise ValueError(f"there is no document {doc}: {self.folder} holds {len(self)}")
        unit = bisect_right(self._unit_ends, doc)
        return unit, doc - (self._unit_ends[unit - 1] if unit else 0)

    def _unit(self, unit: int) -> "_UnitFile":
        if unit in self._open:
            self._open.move_to_end(unit)
        else:
            self._open[unit] = _UnitFile(unit_path(self.folder, unit))
            if len(self._open) > OPEN_UNITS:
                self._open.popitem(last=False)
        return self._open[unit]


class StoredDocuments:
    """Some documents of a store; position i has number `doc[i]`."""

    def __init__(self, store: TokenStore, doc: np.ndarray) -> None:
        self.store = store
        self.doc = doc.astype(np.int64)
        self.length = store._length[doc]
        self.nbytes = store._nbytes[doc]

    def __len__(self) -> int:
        return len(self.doc)

    @property
    def dtype(self) -> np.dtype:
        return self.store.dtype

    def tokens(self, i: int) -> np.ndarray:
        return self.store.tokens(int(self.doc[i]))

    def targets(self) -> tuple[Spans, np.ndarray]:
        """As `TokenStore.targets`, of all of them."""
        return self.store.targets(self.doc)

    def key(self, i: int) -> str:
        return self.store.key(int(self.doc[i]))


class _UnitFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
                self.dtype = np.dtype(stream.schema.field("tokens").type.value_type.to_pandas_dtype())
                batches = list(stream)
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        self._ends = np.cumsum([batch.num_rows for batch in batches], dtype=np.int64).tolist()
        self._keys = [batch["key"] for batch in batches]
        self._offsets = [batch["tokens"].offsets.to_numpy() for batch in batches]
        self._values = [batch["tokens"].values.to_numpy() for batch in batches]
        self._targets = [
            (_spans(batch["targets"]), batch["target_bytes"].to_numpy())
            for batch in batches
            if "targets" in batch.schema.names
        ]

    def tokens(self, row: int) -> np.ndarray:
        batch, row = self._batch(row)
        offsets = self._offsets[batch]
        return self._values[batch][offsets[row] : offsets[row + 1]]

    def key(self, row: int) -> str:
        batch, row = self._batch(row)
        return self._keys[batch][row].as_py()

    def targets(self, rows: np.ndarray) -> tuple[Spans, np.ndarray]:
        if not self._targets:
            raise ValueError(f"{self.path} does not say which tokens carry loss: restore it")
        spans, nbytes = zip(*self._targets, strict=True)
        return joined(spans).select(rows), np.concatenate(nbytes)[rows]

    def find(self, key: str) -> int | None:
        start = 0
        for keys, end in zip(self._keys, self._ends, strict=True):
            if (row := keys.index(key).as_py() if hasattr(keys, "index") else -1) >= 0:
                return start + row
            start = end
        return None

    def _batch(self, row: int) -> tuple[int, int]:
        batch = bisect_right(self._ends, row)
        return batch, row - (self._ends[batch - 1] if batch else 0)


def targets_of_unit(path: Path) -> tuple[Spans, np.ndarray]:
    """Those of all documents of a unit's file, and the tokens of each. Raises ValueError."""
    file = _UnitFile(path)
    lengths = np.concatenate([np.zeros(0, np.int64), *(np.diff(offsets) for offsets in file._offsets)])
    if not len(lengths):
        return Spans(np.zeros(1, np.int64), lengths, lengths), lengths
    return file.targets(np.arange(len(lengths)))[0], lengths


def _spans(column: pa.ListArray) -> Spans:
    begin, end = column.values.values.to_numpy().reshape(-1, 2).T
    return Spans(column.offsets.to_numpy().astype(np.int64), begin, end)
