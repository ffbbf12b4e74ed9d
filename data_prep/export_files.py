"""Token sequences in the files of other programs, with the boundaries of documents that these files can hold.

    megatron  SPLIT-SOURCE.bin, .idx: `IndexedDataset` of Megatron-LM and its descendants
              (megatron/core/datasets/indexed_dataset.py); a document is one sequence, a row a document of pieces
    mds       SPLIT/SOURCE/shard.00000.mds, index.json: MosaicML Streaming (streaming/base/format/mds), a stream for each
              source, each shard with its SHA-1; llm-foundry takes the column `tokens` as it is
    parquet   SPLIT/SOURCE-00000.parquet: tables with a list of ids in each row, `input_ids`

Ids are uint16 up to a vocabulary of 65,536 entries and int32 above, which all three and torch can read.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.atomic import new_file, write_atomically
from storage.manifest import file_sha256

EXPORT_FILE = "export.json"
MEGATRON_HEADER = b"MMIDIDX\0\0" + np.uint64(1).tobytes()
MEGATRON_TYPES = {"int32": 4, "uint16": 8}
INDEX_PIECE = 1 << 20
PARQUET_BATCH_BYTES = 1 << 24


class Entry(NamedTuple):
    """A document, or a row of packed ones."""

    tokens: np.ndarray  # [n]
    pieces: np.ndarray  # int32 [pieces]: tokens of each; what lies behind them is padding
    fields: dict[str, Any]
    """What else is known of it, by column: whole numbers, texts, and arrays of numbers, [n] or [n, 2]."""


class FilePart(NamedTuple):
    """The entries first .. last (exclusive) of a source of a split, which go to one file (or pair of files)."""

    split: str
    source: str
    number: int
    first: int
    last: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.source}-{self.number:05d}"


class WrittenPart(NamedTuple):
    files: list[str]
    """Below the export's folder."""
    shard: dict[str, Any] | None = None
    """What the index of a source says of it (mds)."""


def write_megatron(root: Path, part: FilePart, entries: Iterable[Entry], dtype: str) -> WrittenPart:
    """A .bin and its .idx. Of rows the padding is left out: a sequence is a piece of a document."""
    name = f"{part.split}-{part.source}"
    lengths: list[np.ndarray] = [np.zeros(0, np.int32)]
    ends = [0]
    with new_file(root / f"{name}.bin") as file:
        for entry in entries:
            file.write(entry.tokens[: entry.pieces.sum()].astype(dtype).tobytes())
            lengths.append(entry.pieces)
            ends.append(ends[-1] + len(entry.pieces))
    with new_file(root / f"{name}.idx") as file:
        _write_megatron_index(file, np.concatenate(lengths), np.array(ends, np.int64), np.dtype(dtype))
    return WrittenPart([f"{name}.bin", f"{name}.idx"])


def _write_megatron_index(file: BinaryIO, lengths: np.ndarray, ends: np.ndarray, dtype: np.dtype) -> None:
    """Lengths of sequences (int32), where each begins in bytes (int64), and the first sequence of each document (int64)."""
    file.write(MEGATRON_HEADER + np.uint8(MEGATRON_TYPES[dtype.name]).tobytes())
    file.write(np.array([len(lengths), len(ends)], np.uint64).tobytes())
    file.write(lengths.astype(np.int32).tobytes())
    begin = 0
    for first in range(0, len(lengths), INDEX_PIECE):
        behind = begin + np.cumsum(lengths[first : first + INDEX_PIECE], dtype=np.int64) * dtype.itemsize
        file.write((behind - lengths[first : first + INDEX_PIECE].astype(np.int64) * dtype.itemsize).tobytes())
        begin = int(behind[-1])
    file.write(ends.tobytes())


def write_parquet(root: Path, part: FilePart, entries: Iterable[Entry], dtype: str) -> WrittenPart:
    """A table; a row group is about 16 MB of ids."""
    name = f"{part.split}/{part.source}-{part.number:05d}.parquet"
    schema: pa.Schema | None = None
    (root / part.split).mkdir(exist_ok=True)
    with new_file(root / name) as file:
        writer: pq.ParquetWriter | None = None
        for batch in _batches(entries):
            if schema is None:
                schema = _parquet_schema(batch[0], dtype)
            columns = {"input_ids": [entry.tokens.astype(dtype) for entry in batch]}
            columns |= {name: [entry.fields[name] for entry in batch] for name in batch[0].fields}
            arrays = [_parquet_column(columns[field.name], field.type) for field in schema]
            writer = writer or pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=["source"])
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
        assert writer is not None, "a part has entries"
        writer.close()
    return WrittenPart([name])


def _parquet_schema(entry: Entry, dtype: str) -> pa.Schema:
    columns = {"input_ids": pa.list_(pa.type_for_alias(dtype))}
    for name, value in entry.fields.items():
        if isinstance(value, np.ndarray):
            kind = pa.from_numpy_dtype(value.dtype)
            columns[name] = pa.list_(pa.list_(kind)) if value.ndim == 2 else pa.list_(kind)
        else:
            columns[name] = pa.string() if isinstance(value, str) else pa.int64()
    return pa.schema(columns)


def _parquet_column(values: list[Any], kind: pa.DataType) -> pa.Array:
    if not pa.types.is_list(kind):
        return pa.array(values, kind)
    offsets = np.concatenate([[0], np.cumsum([len(value) for value in values])]).astype(np.int32)
    together = np.concatenate(values)
    inner = pa.array(together.reshape(-1))
    if pa.types.is_list(kind.value_type):
        inner = pa.ListArray.from_arrays(np.arange(len(together) + 1, dtype=np.int32) * 2, inner)
    return pa.ListArray.from_arrays(offsets, inner)


def _batches(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    batch: list[Entry] = []
    size = 0
    for entry in entries:
        batch.append(entry)
        size += entry.tokens.nbytes
        if size >= PARQUET_BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def write_mds(root: Path, part: FilePart, entries: Iterable[Entry], dtype: str) -> WrittenPart:
    """A shard: number of samples, where each begins and the last ends (uint32), the settings as JSON, the samples."""
    name = f"{part.split}/{part.source}/shard.{part.number:05d}.mds"
    encodings: dict[str, str] = {}
    sizes: dict[str, int | None] = {}
    samples = []
    for entry in entries:
        columns = {"tokens": entry.tokens.astype(dtype)} | entry.fields
        if not encodings:
            encodings = {column: _mds_encoding(columns[column]) for column in sorted(columns)}
            sizes = {column: 8 if encoding == "int" else None for column, encoding in encodings.items()}
        encoded = {column: _mds_bytes(columns[column]) for column in encodings}
        head = [len(encoded[column]) for column, size in sizes.items() if size is None]
        samples.append(b"".join([np.array(head, np.uint32).tobytes(), *encoded.values()]))
    settings = {
        "version": 2,
        "format": "mds",
        "compression": None,
        "hashes": ["sha1"],
        "size_limit": None,
        "column_names": list(encodings),
        "column_encodings": list(encodings.values()),
        "column_sizes": list(sizes.values()),
    }
    config = json.dumps(settings, sort_keys=True).encode()
    begin = np.cumsum([0, *map(len, samples)]) + 4 * (len(samples) + 2) + len(config)
    if begin[-1] >= 1 << 32:
        raise ValueError(f"{name} would have {begin[-1]:,} bytes, and a shard of MDS has at most 4 GiB: use parquet")
    digest = hashlib.sha1(usedforsecurity=False)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    with new_file(root / name) as file:
        for data in (np.array([len(samples), *begin], np.uint32).tobytes(), config, *samples):
            digest.update(data)
            file.write(data)
    raw = {"basename": Path(name).name, "bytes": int(begin[-1]), "hashes": {"sha1": digest.hexdigest()}}
    return WrittenPart([name], settings | {"samples": len(samples), "raw_data": raw, "zip_data": None})


def _mds_encoding(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"ndarray:{value.dtype.name}"
    return "str" if isinstance(value, str) else "int"


def _mds_bytes(value: Any) -> bytes:
    """Of an array: 4 times its dimensions, and 2 for sizes in uint32; the sizes; the values."""
    if isinstance(value, np.ndarray):
        return bytes([value.ndim * 4 + 2]) + np.array(value.shape, np.uint32).tobytes() + value.tobytes()
    return value.encode() if isinstance(value, str) else np.int64(value).tobytes()


def write_mds_index(root: Path, split: str, source: str, shards: list[dict[str, Any]]) -> str:
    """The index.json of a source, whose name below the export's folder is returned."""
    name = f"{split}/{source}/index.json"
    write_atomically(root / name, json.dumps({"version": 2, "shards": shards}, sort_keys=True).encode())
    return name


class Format(NamedTuple):
    write: Callable[[Path, FilePart, Iterable[Entry], str], WrittenPart]
    part_bytes: int | None
    """Ids of a part, about; None: a source is one part."""
    spans: bool
    """Can it say which tokens carry loss?"""


FORMATS = {
    "megatron": Format(write_megatron, None, False),
    "mds": Format(write_mds, 1 << 26, True),
    "parquet": Format(write_parquet, 1 << 28, True),
}


def file_facts(root: Path, file: str) -> dict[str, Any]:
    """Name, bytes and SHA-256 of a file of an export."""
    return {"file": file, "bytes": (root / file).stat().st_size, "sha256": file_sha256(root / file)}


def export_problems(root: Path, full: bool = False) -> Iterator[tuple[int, str | None]]:
    """Per file of an export its bytes and a sentence on what is wrong with it, or None; `full`: its bytes are hashed."""
    for facts in read_export(root)["files"]:
        path, size = root / facts["file"], facts["bytes"]
        if not path.is_file():
            yield size, f"{path} is missing: restore it or export again"
        elif path.stat().st_size != size:
            yield size, f"{path} has {path.stat().st_size} bytes, {EXPORT_FILE} says {size}"
        elif full and file_sha256(path) != facts["sha256"]:
            yield size, f"{path} has changed: its sha256 is not that of {EXPORT_FILE}"
        else:
            yield size, None


def read_export(root: Path) -> dict[str, Any]:
    """What `export.json` says. Raises ValueError."""
    try:
        content = json.loads((root / EXPORT_FILE).read_bytes())
        [(facts["file"], facts["bytes"], facts["sha256"]) for facts in content["files"]]
        return dict(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{root / EXPORT_FILE} cannot be read ({error}): export again") from None
