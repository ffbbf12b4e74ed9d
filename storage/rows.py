"""The columns of a shard: rows of packed tokens, the pieces of documents in them, and which tokens carry loss.

A row holds W = T + 1 tokens: inputs are row[:-1], targets row[1:]. It consists of consecutive pieces of documents and,
if they do not fill it, padding. Masks, labels and positions are not stored: they follow from the pieces.

    column        type                             per row
    input_ids     fixed_size_list<uint16|uint32>   W tokens
    seg_len       list<int32>                      tokens of each piece
    seg_ctx       list<int32>                      leading tokens of each piece that are overlap context: no targets
    seg_doc       list<int64>                      document the piece was cut from
    seg_off       list<int64>                      where in that document it begins
    target_spans  list<fixed_size_list<int32>[2]>  tokens that carry loss, from and to (exclusive), ascending

Without `target_spans`, which only some data sets have, every token of a piece but its first and its context carries loss.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa

SEGMENT_COLUMNS = {"seg_len": "int32", "seg_ctx": "int32", "seg_doc": "int64", "seg_off": "int64"}
TARGET_COLUMN = "target_spans"
BATCH_BYTES = 1 << 23
BATCH_ROWS = 1 << 10


class RowBlock(NamedTuple):
    """n rows of one record batch; row j has the pieces splits[j]:splits[j + 1]."""

    ids: np.ndarray  # uint16 | uint32 [n, W]
    splits: np.ndarray  # int32 [n + 1]
    seg_len: np.ndarray  # int32 [pieces]
    seg_ctx: np.ndarray  # int32 [pieces]
    seg_doc: np.ndarray  # int64 [pieces]
    seg_off: np.ndarray  # int64 [pieces]
    target_splits: np.ndarray | None = None  # int32 [n + 1]: row j has the spans target_splits[j]:target_splits[j + 1]
    target_spans: np.ndarray | None = None  # int32 [spans, 2]

    @property
    def pieces(self) -> tuple[np.ndarray, ...]:
        """The columns of SEGMENT_COLUMNS."""
        return self[2:6]

    def spans(self, row: int) -> np.ndarray | None:
        """Stretches of tokens of a row that carry loss, int32 [spans, 2]; None: all that may."""
        if self.target_splits is None or self.target_spans is None:
            return None
        return self.target_spans[self.target_splits[row] : self.target_splits[row + 1]]


class Row(NamedTuple):
    ids: np.ndarray  # uint16 | uint32 [W]
    seg_len: np.ndarray  # int32 [pieces]
    seg_ctx: np.ndarray
    seg_doc: np.ndarray
    seg_off: np.ndarray


def rows_per_batch(row_tokens: int, dtype: str) -> int:
    """Rows of every record batch but a shard's last: a power of two, at most 1024 rows and about 8 MiB."""
    rows = BATCH_BYTES // max(1, (row_tokens - 1) * np.dtype(dtype).itemsize)
    return min(BATCH_ROWS, 1 << max(0, rows.bit_length() - 1))


def shard_schema(
    row_tokens: int, dtype: str, metadata: dict[str, str] | None = None, target_spans: bool = False
) -> pa.Schema:
    """Columns of a shard: rows of `row_tokens` ids, lists of the segments in them and, if there are any, of the targets."""
    columns = {"input_ids": pa.list_(pa.from_numpy_dtype(np.dtype(dtype)), row_tokens)}
    columns |= {name: pa.list_(pa.type_for_alias(kind)) for name, kind in SEGMENT_COLUMNS.items()}
    if target_spans:
        columns[TARGET_COLUMN] = pa.list_(pa.list_(pa.int32(), 2))
    return pa.schema(columns, metadata)


def record_batch(block: RowBlock, schema: pa.Schema) -> pa.RecordBatch:
    """The block as Arrow columns."""
    offsets = pa.array(block.splits, pa.int32())
    columns: list[pa.Array] = [_lists(block.ids)]
    for values, kind in zip(block.pieces, SEGMENT_COLUMNS.values(), strict=True):
        columns.append(pa.ListArray.from_arrays(offsets, pa.array(values, kind)))
    if block.target_spans is not None:
        columns.append(pa.ListArray.from_arrays(pa.array(block.target_splits, pa.int32()), _lists(block.target_spans)))
    return pa.record_batch(columns, schema=schema)


def _lists(values: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def row_block(batch: pa.RecordBatch) -> RowBlock:
    """Views of a record batch's columns, without a copy."""
    ids, *lists = batch.columns
    segments, targets = lists[: len(SEGMENT_COLUMNS)], lists[len(SEGMENT_COLUMNS) :]
    return RowBlock(
        ids.values.to_numpy().reshape(len(ids), -1),
        segments[0].offsets.to_numpy(),
        *(column.values.to_numpy() for column in segments),
        *(column.offsets.to_numpy() for column in targets),
        *(column.values.values.to_numpy().reshape(-1, 2) for column in targets),
    )
