"""The shard format: rows of packed tokens in Arrow IPC stream files, written once and read through memory maps.

    DATA/manifest.json                       what is here (storage/manifest.py), written last
    DATA/<split>/shard-<source>-00000.arrow  rows; a record batch is a fixed number of rows
    DATA/<split>/documents-<source>.arrow    which rows hold a document (storage/documents.py)
    DATA/<split>/pieces-<source>.arrow       which documents a row holds (storage/pieces.py)
    DATA/<split>/state.json, dataset_info.json   let `datasets.load_from_disk` open the split in place

What a row holds: storage/rows.py. Only the stream form of Arrow can be opened in place by `datasets`, but a stream cut
between two messages reads as fewer rows without an error, hence the sizes, row counts and hashes of the manifest.
"""

import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import pyarrow as pa

from storage.atomic import publish
from storage.manifest import Manifest, Shard, read_manifest
from storage.mapped import MappedShard
from storage.on_demand import on_demand
from storage.pieces import PieceFile, Pieces
from storage.rows import (
    Row,
    RowBlock,
    record_batch,
    rows_per_batch,
    shard_schema,
)
from storage.shard_check import manifest_schema, shard_identity, shard_problem

SHARD_BYTES = 1 << 28

Verify = Literal["none", "quick", "full"]


class ShardWriter:
    """Writes the rows of one source of one split; as a context manager it leaves no partial file behind.

    `metadata` is stored in every shard beside its place in the data set. `close` returns the manifest's entries.
    """

    def __init__(
        self,
        directory: Path,
        split: str,
        source: str,
        row_tokens: int,
        dtype: str,
        metadata: dict[str, str] | None = None,
        rows_per_shard: int | None = None,
        target_spans: bool = False,
        first_shard: int = 0,
    ) -> None:
        self.root, self.split, self.source = Path(directory), split, source
        self.row_tokens, self.dtype, self.target_spans = row_tokens, dtype, target_spans
        self.batch_rows = rows_per_batch(row_tokens, dtype)
        batch_bytes = self.batch_rows * row_tokens * np.dtype(dtype).itemsize
        self.shard_rows = rows_per_shard or max(1, round(SHARD_BYTES / batch_bytes)) * self.batch_rows
        if self.shard_rows % self.batch_rows:
            raise ValueError(f"rows_per_shard {self.shard_rows} must be a multiple of {self.batch_rows}")
        self.metadata = metadata or {}
        self.shards, self.first_shard = list[Shard](), first_shard
        self._open: _ShardFile | None = None
        (self.root / split).mkdir(parents=True, exist_ok=True)

    def write(self, block: RowBlock) -> None:
        """Append a block; all but the last must hold exactly `batch_rows` rows."""
        assert block.ids.shape[1] == self.row_tokens
        assert block.ids.dtype == self.dtype
        assert (block.target_spans is not None) == self.target_spans
        if self._open is None:
            number = self.first_shard + len(self.shards)
            self._open = _ShardFile(
                self.root,
                f"{self.split}/shard-{self.source}-{number:05d}.arrow",
                shard_schema(
                    self.row_tokens,
                    self.dtype,
                    self.metadata | shard_identity(self.split, self.source, number),
                    self.target_spans,
                ),
            )
        assert self._open.rows % self.batch_rows == 0, "only the last block may be shorter"
        self._open.write(block)
        if self._open.rows == self.shard_rows:
            self._finish_shard()

    def close(self) -> list[Shard]:
        """Publish the last shard; return the entries of all."""
        self._finish_shard()
        return self.shards

    def _finish_shard(self) -> None:
        if self._open is not None:
            self.shards.append(self._open.close())
            self._open = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        elif self._open is not None:
            self._open.discard()


class _ShardFile:
    """A shard being written: hashed on the way to disk, renamed to its name when complete."""

    def __init__(self, root: Path, file: str, schema: pa.Schema) -> None:
        self.file, self.path, self.rows = file, root / file, 0
        self.min_id, self.max_id = np.iinfo(np.int64).max, 0
        self.digest = hashlib.sha256()
        self.temporary = self.path.with_name(self.path.name + ".tmp")
        self.output = self.temporary.open("wb")
        self.schema = schema
        self.stream = pa.ipc.new_stream(_Tee(self.output, self.digest), schema)

    def write(self, block: RowBlock) -> None:
        self.stream.write_batch(record_batch(block, self.schema))
        self.rows += len(block.ids)
        self.min_id = min(self.min_id, int(block.ids.min()))
        self.max_id = max(self.max_id, int(block.ids.max()))

    def close(self) -> Shard:
        self.stream.close()
        self.output.flush()
        os.fsync(self.output.fileno())
        size = self.output.tell()
        self.output.close()
        publish(self.temporary, self.path)
        return Shard(
            file=self.file,
            rows=self.rows,
            bytes=size,
            sha256=self.digest.hexdigest(),
            min_id=self.min_id,
            max_id=self.max_id,
        )

    def discard(self) -> None:
        self.output.close()
        self.temporary.unlink(missing_ok=True)


class _Tee:
    """The part of a file object that pyarrow writes to, feeding a hash beside the file."""

    closed = False

    def __init__(self, output: BinaryIO, digest: "hashlib._Hash") -> None:
        self.output, self.digest = output, digest

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.output.write(data)

    def flush(self) -> None:
        self.output.flush()


class ShardedDataset:
    """The rows of one split as zero-copy numpy views over memory-mapped shards.

    A shard is mapped when one of its rows is first asked for, and no token is read before that. An instance may be
    used after a fork and may be pickled: mappings are inherited by the one and left behind by the other.

    Whoever asks for a row of a shard that was shortened, replaced or removed since gets a ValueError: what is mapped of
    such a file may be other rows, or end the process with SIGBUS. A file is looked at once in `mapped.LOOK_SECONDS`.
    """

    def __init__(self, directory: Path, split: str, manifest: Manifest) -> None:
        self.directory, self.split, self.manifest = Path(directory), split, manifest
        entries = manifest.splits[split]
        self.sources: list[str] = sorted(name for name, entry in entries.items() if entry.rows)
        self.rows_per_source: dict[str, int] = {name: entries[name].rows for name in self.sources}
        self._shards = [entries[name].shards for name in self.sources]
        self._shard_rows = [shards[0].rows for shards in self._shards]
        self._batch_rows = rows_per_batch(manifest.packing.row_tokens, manifest.dtype)
        self._mapped: list[list[MappedShard | None]] = [[None] * len(shards) for shards in self._shards]
        self._piece_files: dict[int, PieceFile | None] = {}
        self._on_demand, self._brought = on_demand(self.directory), 0

    def __len__(self) -> int:
        return sum(self.rows_per_source.values())

    def __getstate__(self) -> dict:
        mapped = {"_mapped": [[None] * len(shards) for shards in self._shards], "_piece_files": {}}
        return self.__dict__ | mapped | {"_brought": 0}

    def find(self, source: int, row: int) -> tuple[RowBlock, int]:
        """The block that holds row `row` of `self.sources[source]`, and the row's index in it."""
        shard, row = divmod(row, self._shard_rows[source])
        mapped = self._mapped[source][shard] or self._map(source, shard)
        if time.monotonic() > mapped.good_until:
            mapped.look()
        block, row = divmod(row, self._batch_rows)
        return mapped.blocks[block], row

    def blocks(self, source: str) -> Iterator[tuple[int, RowBlock]]:
        """All blocks of a source in order, each with the number of its first row."""
        number, first = self.sources.index(source), 0
        while first < self.rows_per_source[source]:
            block, _ = self.find(number, first)
            yield first, block
            first += len(block.ids)

    def place(self, number: int) -> tuple[str, int]:
        """Source and row in it of row `number` of the split, sources being in the order of their names."""
        for source, rows in self.rows_per_source.items():
            if number < rows:
                return source, number
            number -= rows
        raise IndexError(f"split {self.split} has {len(self)} rows")

    def row(self, source: str, row: int) -> Row:
        """One row by the name of its source; `IndexError` beyond the last."""
        if not 0 <= row < self.rows_per_source.get(source, 0):
            raise IndexError(f"source {source!r} has no row {row} in split {self.split}")
        block, j = self.find(self.sources.index(source), row)
        pieces = slice(block.splits[j], block.splits[j + 1])
        return Row(block.ids[j], *(column[pieces] for column in block.pieces))

    def pieces(self, source: int, row: int) -> Pieces:
        """Of row `row` of `self.sources[source]`, for which no shard is opened where the source has a file of its pieces."""
        file = self._piece_files.get(source)
        if source not in self._piece_files or (file and file.is_other()):
            file = self._piece_files[source] = self.open_pieces(self.sources[source])
        if file:
            return file.of_row(row)
        block, j = self.find(source, row)
        mine = slice(block.splits[j], block.splits[j + 1])
        return Pieces(block.seg_len[mine], block.seg_doc[mine])

    def open_pieces(self, source: str) -> PieceFile | None:
        """None where there is no file of pieces, or one that was not made from these shards."""
        entry = self.manifest.splits[self.split][source]
        return PieceFile.open(self.piece_path(source), entry.shards_hash, entry.rows)

    def piece_path(self, source: str) -> Path:
        return self.directory / self.split / f"pieces-{source}.arrow"

    def spans(self, source: str, row: int) -> np.ndarray | None:
        """Which tokens of a row carry loss (see `RowBlock.spans`)."""
        block, j = self.find(self.sources.index(source), row)
        return block.spans(j)

    def verify(self, full: bool = False) -> Iterator[tuple[Shard, str | None]]:
        """Check every shard against the manifest; yield it with a sentence on what is wrong, or None."""
        for source, shards in zip(self.sources, self._shards, strict=True):
            for number, shard in enumerate(shards):
                path = self.directory / shard.file
                if self._on_demand is not None:
                    if not full:  # compared with its hash when it comes
                        yield shard, None
                        continue
                    self._on_demand.use(shard.file, path.stat)
                identity = shard_identity(self.split, source, number)
                yield shard, shard_problem(path, shard, self.manifest, identity, full)

    def _map(self, source: int, shard: int) -> MappedShard:
        entry = self._shards[source][shard]
        path = self.directory / entry.file
        try:
            if self._on_demand is None:
                mapped = MappedShard(path)
            else:
                self._let_go(entry.bytes, self._on_demand.limit)
                mapped = self._on_demand.use(entry.file, lambda: MappedShard(path, may_go=True))
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{path} cannot be read ({error}): run `python -m data_prep.verify`") from None
        if not mapped.schema.equals(manifest_schema(self.manifest)) or mapped.rows != entry.rows:
            raise ValueError(f"{path} does not hold the {entry.rows} rows of the manifest: restore it")
        self._mapped[source][shard] = mapped
        return mapped

    def _let_go(self, size: int, limit: int) -> None:
        """Unmap all shards before there are more bytes of them than `limit`: each keeps its file's bytes on the disk."""
        self._brought += size
        if self._brought > limit:
            self._mapped = [[None] * len(shards) for shards in self._shards]
            self._brought = size


def open_split(directory: Path, split: str, verify: Verify = "quick", vocab_size: int | None = None) -> ShardedDataset:
    """Open a split of a prepared data set.

    verify: "quick" compares existence, size, place, schema and row counts of every shard with the manifest, "full" also
    hashes them, "none" trusts them (another process has checked). `vocab_size` is the model's: ids must lie below it.
    """
    manifest = read_manifest(directory)
    if split not in manifest.splits:
        raise ValueError(f"{directory} has no split {split!r}: it has {', '.join(sorted(manifest.splits))}")
    dataset = ShardedDataset(directory, split, manifest)
    highest = max((shard.max_id for shards in dataset._shards for shard in shards), default=0)
    if vocab_size is not None and highest >= vocab_size:
        raise ValueError(f"{directory} holds token id {highest}, but the model's vocab_size is {vocab_size}")
    if verify != "none":
        for _, problem in dataset.verify(full=verify == "full"):
            if problem:
                raise ValueError(problem)
    return dataset
