"""What of a token store's documents is left out, and why: `tokens/dropped.arrow`, one row a document or stretch of one.

doc    int64    number of the document
begin  int64    first token that is left out
end    int64    behind the last; 0 and the document's length: all of it
reason string   one of REASONS
value  float64  how similar (duplicates), or the n-grams shared (contamination)
of     int64    the document that has the same, or -1
nbytes int64    UTF-8 bytes of the text that these tokens make
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from storage.atomic import new_stream

DROPPED_FILE = "dropped.arrow"
REASONS = ("exact duplicate", "near-duplicate", "repeated sections", "repeated section", "contaminated")
SCHEMA = pa.schema(
    {
        "doc": pa.int64(),
        "begin": pa.int64(),
        "end": pa.int64(),
        "reason": pa.string(),
        "value": pa.float64(),
        "of": pa.int64(),
        "nbytes": pa.int64(),
    }
)


class Dropped(NamedTuple):
    """Rows in the order of documents and tokens; stretches of a document do not overlap."""

    doc: np.ndarray  # int64 [rows], as all but `value`
    begin: np.ndarray
    end: np.ndarray
    reason: np.ndarray  # uint8: position in REASONS
    value: np.ndarray  # float64
    of: np.ndarray
    nbytes: np.ndarray

    def select(self, rows: np.ndarray) -> "Dropped":
        """Those that a bool [rows] or positions choose."""
        return Dropped(*(column[rows] for column in self))

    def whole(self, lengths: np.ndarray) -> np.ndarray:
        """bool [rows]: is it all of its document? `lengths`: tokens of each document of the store."""
        return (self.begin == 0) & (self.end == lengths[self.doc])


KINDS = ("int64", "int64", "int64", "uint8", "float64", "int64", "int64")


def dropped_of(rows: list[tuple]) -> Dropped:
    """Of tuples in the order of the columns, in the order of the rows."""
    columns = zip(*rows, strict=True) if rows else [()] * len(KINDS)
    return Dropped(*(np.array(column, kind) for column, kind in zip(columns, KINDS, strict=True)))


def ordered(parts: Sequence[Dropped]) -> Dropped:
    """All rows, by document and token."""
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    order = np.lexsort((columns[1], columns[0]))
    return Dropped(*(column[order] for column in columns))


def write_dropped(folder: Path, dropped: Dropped) -> None:
    """Write a store's file; where nothing is dropped there is none."""
    path = folder / DROPPED_FILE
    if not len(dropped.doc):
        path.unlink(missing_ok=True)
        return
    columns = [pa.array(column) for column in dropped]
    reasons = pa.DictionaryArray.from_arrays(pa.array(dropped.reason.astype(np.int32)), pa.array(REASONS))
    columns[Dropped._fields.index("reason")] = reasons.cast(pa.string())
    with new_stream(path, SCHEMA) as stream:
        stream.write_batch(pa.record_batch(columns, schema=SCHEMA))


def read_dropped(folder: Path) -> Dropped:
    """Of a token store; nothing where there is no file. Raises ValueError."""
    path = folder / DROPPED_FILE
    if not path.exists():
        return dropped_of([])
    try:
        with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
            table = stream.read_all().combine_chunks()
        reason = np.array([REASONS.index(name) for name in table["reason"].to_pylist()], np.uint8)
    except (OSError, ValueError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path} cannot be read ({error}): restore it, or build the data set again") from None
    return Dropped(*(reason if name == "reason" else table[name].to_numpy() for name in Dropped._fields))


class Cuts:
    """Stretches of tokens that are left out of documents of which the rest stays."""

    def __init__(self, dropped: Dropped) -> None:
        self.doc, self.begin, self.end = dropped.doc, dropped.begin, dropped.end

    def applied(self, doc: int, ids: np.ndarray) -> np.ndarray:
        """The tokens of a document without its cuts."""
        first, last = np.searchsorted(self.doc, [doc, doc + 1]).tolist()
        if first == last:
            return ids
        edges = np.stack([self.begin[first:last], self.end[first:last]], axis=1).reshape(-1)
        return np.concatenate(np.split(ids, edges)[::2])
