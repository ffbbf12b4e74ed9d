"""Documents in tables: Parquet and Arrow files, by row groups and record batches."""

import hashlib
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.elsewhere import READ_BYTES, open_file, open_table
from data_prep.records import Document, Fields, InputFile, Problems, Unit, checked_document, column_problem
from storage.remote import RemoteError

TABLE_ROWS = 64
FILE_MAGIC = b"ARROW1"
"""Stands at both ends of Arrow's file format; in between is the stream format, and an index that is not needed."""
STREAM_BEGIN, STREAM_END = 8, b"\xff\xff\xff\xff\0\0\0\0"
PADDING = 63
"""More bytes behind the end of a stream than writers align to are batches that cannot be found."""
TABLE_ERRORS = (pa.ArrowException, OSError, ValueError, MemoryError)


class Group(NamedTuple):
    rows: int
    size: int


def table_groups(path: str, format_: str) -> list[Group]:
    """Row groups or record batches; damage is counted as one more, so that whoever reads it finds it and says so."""
    groups: list[Group] = []
    try:
        with _TABLES[format_](path) as table:
            groups.extend(table.groups())
    except RemoteError:
        raise
    except TABLE_ERRORS:
        groups.append(Group(0, 0))
    return groups


class _Parquet:
    lost = "in row groups that are not read whole (their bytes of the columns that are read)"

    def __init__(self, path: str) -> None:
        self.map = open_table(path)
        self.file = pq.ParquetFile(self.map, page_checksum_verification=True)
        self.schema = self.file.schema_arrow

    def __enter__(self) -> "_Parquet":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close(force=True)

    def groups(self) -> Iterator[Group]:
        for number in range(self.file.metadata.num_row_groups):
            group = self.file.metadata.row_group(number)
            yield Group(group.num_rows, group.total_byte_size)

    def rows(self, group: int) -> int:
        return self.file.metadata.row_group(group).num_rows if group < self.file.metadata.num_row_groups else 0

    def stored(self, group: int, columns: list[str]) -> int:
        """Bytes of the file that hold these columns of a group."""
        if group >= self.file.metadata.num_row_groups:
            return 0
        part = self.file.metadata.row_group(group)
        chunks = (part.column(number) for number in range(part.num_columns))
        nested = tuple(f"{name}." for name in columns if pa.types.is_nested(self.schema.field(name).type))
        mine = (chunk for chunk in chunks if chunk.path_in_schema in columns or chunk.path_in_schema.startswith(nested))
        sizes = (chunk.total_compressed_size for chunk in mine)
        return min(max(0, sum(sizes)), self.map.size())

    def batches(self, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """The rows of a group; all that stand before damage, and then its error."""
        done = 0
        try:
            for batch in self._batches(TABLE_ROWS, group, columns):
                yield batch
                done += batch.num_rows
        except RemoteError:
            raise
        except TABLE_ERRORS:
            yield from islice(self._batches(1, group, columns), done, None)

    def _batches(self, rows: int, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        for batch in self.file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
            yield batch.select(columns)


class _Arrow:
    def __init__(self, path: str) -> None:
        self.map = open_table(path)
        is_file = self.map.read(STREAM_BEGIN).startswith(FILE_MAGIC)
        self.end = self._end(is_file)
        self.lost = "in record batches that are damaged, or behind these"
        if self.end is None:
            self.lost += " (what is missing at the end cannot be counted)"
        self.map.seek(STREAM_BEGIN if is_file else 0)
        self.stream = pa.ipc.open_stream(self.map)
        self.schema, self.read, self.broken = self.stream.schema, 0, False
        self.begin = self.map.tell()

    def _end(self, is_file: bool) -> int | None:
        """Where the stream ends; None: the file is cut before."""
        size, mark = self.map.size(), FILE_MAGIC if is_file else STREAM_END
        index = 0
        if is_file:
            self.map.seek(max(0, size - len(mark) - 4))
            index = int.from_bytes(self.map.read(4), "little") + 4 + len(mark)
        self.map.seek(max(0, size - len(mark)))
        return size - index if self.map.read(len(mark)) == mark else None

    def __enter__(self) -> "_Arrow":
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()
        self.map.close()

    def groups(self) -> Iterator[Group]:
        while (batch := self._next()) is not None:
            yield Group(batch.num_rows, batch.nbytes)

    def rows(self, group: int) -> int:
        """Known only when they have been read."""
        return 0

    def stored(self, group: int, columns: list[str]) -> int:
        """Bytes of the file from the batch read last to its end, or to that of the file where nothing follows."""
        return (self.map.size() if self.broken else self.map.tell()) - self.begin

    def batches(self, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        while self.read < group and self._next() is not None:
            pass
        if (batch := self._next()) is not None:
            batch = batch.select(columns)
            for column in batch.columns:  # flipped offsets would lead outside the file
                (column.view(BYTES[column.type]) if column.type in BYTES else column).validate(full=True)
            yield batch

    def _next(self) -> pa.RecordBatch | None:
        """The next batch; nothing follows an error, which is raised once."""
        if self.broken:
            return None
        self.broken, self.begin = True, self.map.tell()
        try:
            batch = self.stream.read_next_batch()
        except StopIteration:
            if self.end is None:
                raise pa.ArrowInvalid("its end is missing") from None
            if (behind := self.end - self.map.tell()) > PADDING:
                raise pa.ArrowInvalid(f"it ends {behind} bytes before its end") from None
            return None
        self.broken = False
        self.read += 1
        return batch


_TABLES: dict[str, type[_Parquet] | type[_Arrow]] = {"parquet": _Parquet, "arrow": _Arrow}
BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}


def read_table(
    file: InputFile, unit: Unit, fields: Fields, problems: Problems, digest: "hashlib._Hash | None"
) -> Iterator[Document]:
    """The rows of a unit's groups; of a damaged group those before the damage, and then the next group."""
    if digest is not None and unit.start == 0:  # the file's first unit vouches for all of it
        with open_file(file.path) as handle:
            while block := handle.read(READ_BYTES):
                digest.update(block)
    try:
        table = _TABLES[file.format](file.path)
        problem = _schema_problem(table.schema, fields)
    except RemoteError:  # the connection, not the file
        raise
    except TABLE_ERRORS as error:  # a name that is no text among them
        problems.report(file.path, f"not a readable {file.format} file", " ".join(str(error).split()))
        return problems.leave_out(file.path, "damaged", file.size)
    with table:
        if problem:
            if unit.start == 0:  # said once a file
                problems.report(file.path, problem)
                problems.leave_out(file.path, "no usable column", file.size)
            return None
        names = list(fields.columns)
        row = unit.first_row
        for group in range(unit.start, unit.end):
            end = row + table.rows(group)
            errors: list[str] = []
            for batch in _up_to_error(table.batches(group, names), errors):
                yield from _documents(batch, row, file, fields, problems)
                row += batch.num_rows
            if row < end and not errors:
                errors.append(f"{end - row} rows are missing")
            for words in errors:
                problems.report(f"{file.path} row {row}", "damaged table, rows unreadable", words)
                problems.leave_out(file.path, table.lost, table.stored(group, names))
            row = max(row, end)
    return None


def _up_to_error(batches: Iterator[pa.RecordBatch], errors: list[str]) -> Iterator[pa.RecordBatch]:
    """The batches before an error, whose words go to `errors`."""
    try:
        yield from batches
    except RemoteError:
        raise
    except TABLE_ERRORS as error:
        errors.append(" ".join(str(error).split()))


def _documents(
    batch: pa.RecordBatch, row: int, file: InputFile, fields: Fields, problems: Problems
) -> Iterator[Document]:
    for index in range(batch.num_rows):
        place = f"{file.path} row {row + index}"
        try:
            record = {name: _text(batch.column(name)[index].as_py()) for name in fields.columns}
        except UnicodeDecodeError:
            problems.report(place, "invalid UTF-8")
            continue
        document = checked_document(record, f"{file.name}#{row + index}", fields, place, problems)
        if document is not None:
            yield document


def _text(value: Any) -> Any:
    """Older writers store text as bytes."""
    return value.decode() if isinstance(value, bytes) else value


def _schema_problem(schema: pa.Schema, fields: Fields) -> str | None:
    """Why the columns of these names cannot be read as text and as ids."""
    if problem := column_problem(schema.names, fields):
        return problem
    for name, flag in fields.columns.items():
        kind = schema.field(name).type
        if flag == "--messages-field":
            if not _holds_lists(kind):
                return f"column {name!r} holds {kind}, not lists of messages (see {flag})"
        elif not _holds_text(kind) and not (name in (fields.key, fields.source) and pa.types.is_integer(kind)):
            return f"column {name!r} holds {kind}, not text (see {flag})"
    return None


def _holds_lists(kind: pa.DataType) -> bool:
    types = pa.types
    return (
        types.is_list(kind) or types.is_large_list(kind) or types.is_list_view(kind) or types.is_large_list_view(kind)
    )


def _holds_text(kind: pa.DataType) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    types = pa.types
    return any(
        check(kind)
        for check in (
            types.is_string,
            types.is_large_string,
            types.is_string_view,
            types.is_binary,
            types.is_large_binary,
            types.is_binary_view,
            types.is_fixed_size_binary,
        )
    )
