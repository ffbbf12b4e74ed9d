"""The file of one unit of a token store (see data_prep/store.py): written in batches of documents, read by memory map."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from data_prep.targets import Spans, joined
from storage.atomic import new_stream
from storage.manifest import file_sha256


class DocumentBatch(NamedTuple):
    ids: np.ndarray  # dtype of the store, [tokens]
    lengths: np.ndarray  # int64 [documents]
    keys: list[str]
    nbytes: list[int]
    key_hashes: list[int]
    text_hashes: list[bytes]
    targets: Spans | None = None
    target_bytes: list[int] | None = None
    sources: list[str] | None = None


def unit_schema(dtype: np.dtype, targets: bool = False, sources: bool = False) -> pa.Schema:
    """Columns of a unit's file: one row a document, ids of this type."""
    tokens = pa.large_list(pa.field("item", pa.from_numpy_dtype(dtype), nullable=False))
    columns = {"tokens": tokens, "key": pa.string(), "nbytes": pa.int64()}
    columns |= {"key_hash": pa.uint64(), "text_hash": pa.binary(16)}
    if targets:
        columns |= {"targets": pa.list_(pa.list_(pa.int64(), 2)), "target_bytes": pa.int64()}
    if sources:
        columns |= {"source": pa.string()}
    return pa.schema(columns)


def write_unit(
    path: Path, dtype: np.dtype, batches: Iterator[DocumentBatch], targets: bool = False, sources: bool = False
) -> tuple[str, int]:
    """Write a unit's documents, whose batches all say what their `targets` and `sources` are, or none; returns the file's
    SHA-256 and size."""
    schema = unit_schema(dtype, targets, sources)
    with new_stream(path, schema) as stream:
        for batch in batches:
            stream.write_batch(_record_batch(batch, schema))
    return file_sha256(path), path.stat().st_size


def _record_batch(batch: DocumentBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Columns straight from their buffers: `pa.array` would import pandas, in every worker."""
    kinds = {field.name: field.type for field in schema}
    rows = len(batch.keys)

    def column(name: str, *buffers: bytes | np.ndarray, children: list[pa.Array] | None = None) -> pa.Array:
        length = len(batch.ids) if name == "ids" else rows
        kind = kinds["tokens"].value_type if name == "ids" else kinds[name]
        return pa.Array.from_buffers(kind, length, [None, *map(pa.py_buffer, buffers)], children=children)

    columns = [
        column("tokens", _offsets(batch.lengths, np.int64), children=[column("ids", batch.ids)]),
        column("key", *_strings(batch.keys)),
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
    if batch.sources is not None:
        columns.append(column("source", *_strings(batch.sources)))
    return pa.record_batch(columns, schema=schema)


def _strings(texts: list[str]) -> tuple[np.ndarray, bytes]:
    encoded = [text.encode() for text in texts]
    return _offsets([len(text) for text in encoded], np.int32), b"".join(encoded)


def _int64(values: np.ndarray) -> pa.Array:
    return pa.Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(values)])


def _offsets(lengths: Sequence[int] | np.ndarray, dtype: type[np.integer]) -> np.ndarray:
    offsets = np.zeros(len(lengths) + 1, dtype)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


class UnitFile:
    """A unit's documents by memory map."""

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

    def lengths(self) -> np.ndarray:
        """Tokens of every document, int64."""
        return np.concatenate([np.zeros(0, np.int64), *(np.diff(offsets) for offsets in self._offsets)])

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
    file = UnitFile(path)
    lengths = file.lengths()
    if not len(lengths):
        return Spans(np.zeros(1, np.int64), lengths, lengths), lengths
    return file.targets(np.arange(len(lengths)))[0], lengths


def _spans(column: pa.ListArray) -> Spans:
    begin, end = column.values.values.to_numpy().reshape(-1, 2).T
    return Spans(column.offsets.to_numpy().astype(np.int64), begin, end)
