"""What of a token store's documents is left out, and why: `tokens/dropped.arrow`, one row a document or stretch of one.

doc    int64    number of the document
begin  int64    first token that is left out
end    int64    behind the last; 0 and the document's length: all of it
reason string   one of REASONS
value  float64  how similar (duplicates), or the n-grams shared (contamination)
of     int64    the document that has the same, or -1
nbytes int64    UTF-8 bytes of the text that these tokens make

In the order of documents and tokens, in record batches of about `ROWS_TOGETHER`, none of which divides a document. So many
rows are looked at together; all of them are in files that are mapped, or read again.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.columns import GrowingColumn, mapped_column
from storage.atomic import new_stream

DROPPED_FILE = "dropped.arrow"
ROWS_TOGETHER = 1 << 20
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

    def select(self, rows: np.ndarray | slice) -> "Dropped":
        """Those that a bool [rows], positions or a slice choose."""
        return Dropped(*(column[rows] for column in self))

    def whole(self, lengths: np.ndarray) -> np.ndarray:
        """bool [rows]: is it all of its document? `lengths`: tokens of each document of the store."""
        return (self.begin == 0) & (self.end == lengths[self.doc])

    def pieces(self) -> Iterator["Dropped"]:
        """All rows, so many together."""
        return map(self.select, stretches(self.doc))


KINDS = ("int64", "int64", "int64", "uint8", "float64", "int64", "int64")


def stretches(doc: np.ndarray) -> Iterator[slice]:
    """Of rows with these documents, ascending, those that are looked at together: all or none of a document."""
    first = 0
    while first < len(doc):
        end = first + ROWS_TOGETHER
        if end < len(doc):
            begin = int(np.searchsorted(doc, doc[end]))
            end = begin if begin > first else int(np.searchsorted(doc, doc[end], side="right"))
        yield slice(first, min(end, len(doc)))
        first = end


class DroppedFiles:
    """Rows in a folder of files: added in pieces, and mapped when all are there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._columns = [GrowingColumn(folder / name, kind) for name, kind in zip(Dropped._fields, KINDS, strict=True)]

    def add(self, pieces: Iterable[Dropped]) -> None:
        for piece in pieces:
            for column, values in zip(self._columns, piece, strict=True):
                column.add(values)

    def mapped(self) -> Dropped:
        """All of them; nothing more can be added."""
        return Dropped(*(column.mapped() for column in self._columns))


def kept_in(folder: Path, pieces: Iterable[Dropped]) -> Dropped:
    """These rows, mapped from files in a new folder."""
    files = DroppedFiles(folder)
    files.add(pieces)
    return files.mapped()


def mapped_from(folder: Path) -> Dropped:
    """The rows that `DroppedFiles` keeps in a folder."""
    return Dropped(*(mapped_column(folder / name, kind) for name, kind in zip(Dropped._fields, KINDS, strict=True)))


def dropped_of(rows: list[tuple]) -> Dropped:
    """Of tuples in the order of the columns, in the order of the rows."""
    columns = zip(*rows, strict=True) if rows else [()] * len(KINDS)
    return Dropped(*(np.array(column, kind) for column, kind in zip(columns, KINDS, strict=True)))


def ordered(parts: Sequence[Dropped]) -> Dropped:
    """All rows, by document and token."""
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    order = np.lexsort((columns[1], columns[0]))
    return Dropped(*(column[order] for column in columns))


def in_order(parts: Sequence[Dropped]) -> Iterator[Dropped]:
    """As `ordered`, so many rows together, of parts that are each in order."""
    at = [0] * len(parts)
    while unfinished := [(part.doc, place) for part, place in zip(parts, at, strict=True) if place < len(part.doc)]:
        last = min(int(doc[min(place + ROWS_TOGETHER, len(doc)) - 1]) for doc, place in unfinished)
        ends = [int(np.searchsorted(part.doc, last, side="right")) for part in parts]
        yield ordered([part.select(slice(*rows)) for part, *rows in zip(parts, at, ends, strict=True)])
        at = ends


def write_dropped(folder: Path, pieces: Iterable[Dropped]) -> None:
    """Write a store's file, of rows in order; where nothing is dropped there is none."""
    path, pieces = folder / DROPPED_FILE, (piece for piece in pieces if len(piece.doc))
    first = next(pieces, None)
    if first is None:
        path.unlink(missing_ok=True)
        return
    with new_stream(path, SCHEMA) as stream:
        for piece in chain([first], pieces):
            columns = [pa.array(column) for column in piece]
            reasons = pa.DictionaryArray.from_arrays(pa.array(piece.reason.astype(np.int32)), pa.array(REASONS))
            columns[Dropped._fields.index("reason")] = reasons.cast(pa.string())
            stream.write_batch(pa.record_batch(columns, schema=SCHEMA))


def read_dropped(folder: Path) -> Iterator[Dropped]:
    """Of a token store, so many rows together; nothing where there is no file. Raises ValueError."""
    path = folder / DROPPED_FILE
    try:
        for batch in _batches(path):
            for rows in stretches(batch["doc"].to_numpy()):
                part = batch.slice(rows.start, rows.stop - rows.start)
                reason = pc.index_in(part["reason"], pa.array(REASONS))
                if reason.null_count:
                    raise ValueError(f"it has reasons other than {', '.join(REASONS)}")
                columns = {name: part[name].to_numpy() for name in Dropped._fields if name != "reason"}
                yield Dropped(reason=reason.to_numpy().astype(np.uint8), **columns)
    except (OSError, ValueError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path} cannot be read ({error}): restore it, or build the data set again") from None


def _batches(path: Path) -> list[pa.RecordBatch]:
    """Views of a file's map."""
    if not path.exists():
        return []
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        return list(stream)


class Cuts:
    """Stretches of tokens that are left out of documents of which the rest stays."""

    def __init__(self, parts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
        """Of documents, ascending, and the begins and ends of the stretches; no two parts have the same document."""
        self._parts = [part for part in parts if len(part[0])]
        self._last = [int(doc[-1]) for doc, _, _ in self._parts]

    @classmethod
    def of_store(cls, folder: Path) -> "Cuts":
        """What the file of a token store lists, mapped. Raises ValueError."""
        try:
            batches = _batches(folder / DROPPED_FILE)
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(f"{folder / DROPPED_FILE} cannot be read ({error}): restore it") from None
        return cls([(b["doc"].to_numpy(), b["begin"].to_numpy(), b["end"].to_numpy()) for b in batches])

    def applied(self, doc: int, ids: np.ndarray) -> np.ndarray:
        """The tokens of a document without its cuts."""
        part = bisect_left(self._last, doc)
        if part == len(self._parts):
            return ids
        docs, begin, end = self._parts[part]
        first, last = np.searchsorted(docs, [doc, doc + 1]).tolist()
        if first == last:
            return ids
        edges = np.stack([begin[first:last], end[first:last]], axis=1).reshape(-1)
        return np.concatenate(np.split(ids, edges)[::2])
