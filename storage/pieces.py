"""The pieces of every row by themselves: a file beside the shards of each source, DATA/<split>/pieces-<source>.arrow.

    column   type          per row
    seg_len  list<int32>   as in the shards (storage/rows.py)
    seg_doc  list<int64>

From it follow the documents of a row and what its attention costs, for any number of rows with one map: the shards that they lie
in may be as many as the rows. An Arrow stream of batches of about `PIECES` pieces.
"""

import time
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from storage.mapped import MappedStream
from storage.rows import SEGMENT_COLUMNS, RowBlock

PIECES = 1 << 21
"""A batch is written when it has as many, or more: 24 MiB and a row's 4 bytes."""


class Pieces(NamedTuple):
    """Of a row, in its order."""

    seg_len: np.ndarray
    """Tokens of each, int32 [pieces]."""
    seg_doc: np.ndarray
    """The document that it is of, int64 [pieces]."""


COLUMNS = {name: pa.list_(pa.type_for_alias(SEGMENT_COLUMNS[name])) for name in Pieces._fields}


def pieces_schema(made_from: str) -> pa.Schema:
    """`made_from`: what `PieceFile.open` must be told to believe the file."""
    return pa.schema(COLUMNS, {"made_from": made_from})


class PieceWriter:
    """Takes the rows of a source block by block."""

    def __init__(self, stream: pa.ipc.RecordBatchStreamWriter, schema: pa.Schema) -> None:
        self._stream, self._schema = stream, schema
        self._held, self._pieces = list[pa.RecordBatch](), 0

    def add(self, block: RowBlock) -> None:
        offsets = pa.array(block.splits, pa.int32())
        columns = [pa.ListArray.from_arrays(offsets, pa.array(getattr(block, name))) for name in COLUMNS]
        self._held.append(pa.record_batch(columns, schema=self._schema))
        self._pieces += len(block.seg_len)
        if self._pieces >= PIECES:
            self.flush()

    def flush(self) -> None:
        """Write what is held."""
        if self._held:
            (batch,) = pa.Table.from_batches(self._held).combine_chunks().to_batches()
            self._stream.write_batch(batch)
            self._held, self._pieces = [], 0


class PieceFile(MappedStream):
    """The pieces of a source's rows."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._firsts = list(accumulate((batch.num_rows for batch in self.batches), initial=0))[:-1]
        self._columns = [
            (batch.column(0).offsets.to_numpy(), *(column.values.to_numpy() for column in batch.columns))
            for batch in self.batches
        ]

    @classmethod
    def open(cls, path: Path, made_from: str, rows: int) -> "PieceFile | None":
        """None where there is none of so many rows, or one that is damaged or was made from something else."""
        try:
            found = cls(path)
        except (OSError, pa.ArrowException):
            return None
        return found if found.schema.equals(pieces_schema(made_from), True) and found.rows == rows else None

    def is_other(self) -> bool:
        """Whether the file that has the name now is another one, or none."""
        if time.monotonic() > self.good_until:
            try:
                self.look()
            except ValueError:
                return True
        return False

    def of_row(self, row: int) -> Pieces:
        batch = bisect_right(self._firsts, row) - 1
        splits, lengths, documents = self._columns[batch]
        at = row - self._firsts[batch]
        begin, end = splits[at], splits[at + 1]
        return Pieces(lengths[begin:end], documents[begin:end])

    def agrees(self, first: int, block: RowBlock) -> bool:
        """Whether the rows from `first` on are those of this block, as it was given to the writer."""
        batch = bisect_right(self._firsts, first) - 1
        splits, *columns = self._columns[batch]
        mine = splits[first - self._firsts[batch] :][: len(block.splits)]
        theirs = (getattr(block, name) for name in COLUMNS)
        return np.array_equal(mine - mine[0], block.splits) and all(
            np.array_equal(column[mine[0] : mine[-1]], values) for column, values in zip(columns, theirs, strict=True)
        )
