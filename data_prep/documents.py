"""Reading the documents of one unit of work: strict, streaming, with a place for every complaint.

A document's key is its id field, or where it stands: `file#byte-offset` for lines (in the text after decompression),
`file#row` for tables and JSON lists, and just `file` where a file is one document. Damage ends a file: what stands before
it is kept, to the last whole record, and the rest is reported.
"""

import csv
import hashlib
import json
import sys
from collections.abc import Generator, Iterable, Iterator
from itertools import chain

from data_prep.content import Content
from data_prep.elsewhere import READ_BYTES, file_identity, open_file
from data_prep.records import Document, Fields, InputFile, Problems, Renderer, Unit, checked_document, column_problem
from data_prep.tables import read_table

BOM = b"\xef\xbb\xbf"
Line = tuple[int, bytes]  # the offset at which it begins, and its bytes


def read_unit(
    unit: Unit,
    files: list[InputFile],
    text_field: str,
    id_field: str | None,
    problems: Problems,
    digest: "hashlib._Hash | None" = None,
    chat: Renderer | None = None,
    source_field: str | None = None,
) -> Iterator[Document]:
    """Yield the unit's documents in order; `digest`, a hashlib object, is fed the unit's input bytes.

    `chat` makes the text where records hold conversations; `text_field` is not read then.
    """
    fields = Fields(text_field, id_field, chat, source_field)
    for file in files[unit.first_file : unit.last_file]:
        if digest is not None:
            digest.update(f"{file.format} {file.size}\n".encode())
        _check_unchanged(file)
        if file.kind in ("parquet", "arrow"):
            yield from read_table(file, unit, fields, problems, digest)
        else:
            yield from _read_content(file, unit, fields, problems, digest)
        _check_unchanged(file)


def _check_unchanged(file: InputFile) -> None:
    if file_identity(file.path) != (file.size, file.mtime_ns):
        raise ValueError(f"{file.path} changed while the data set was being built: run the command again")


def _read_content(
    file: InputFile, unit: Unit, fields: Fields, problems: Problems, digest: "hashlib._Hash | None"
) -> Iterator[Document]:
    if file.kind == "text" and (fields.chat or fields.source):
        lacks = "holds no conversations" if fields.chat else "has no fields (see --source-field)"
        problems.report(file.path, f"a text file {lacks}")
        return problems.leave_out(file.path, "text without fields", file.size)
    try:
        content = Content(file.path, file.compression)
    except OSError as error:
        problems.report(file.path, "cannot be opened", error.strerror or str(error))
        return problems.leave_out(file.path, "cannot be opened", file.size)
    with content:
        lines = _Lines(content, file, unit, digest)
        if file.kind == "text":
            of_all = yield from _read_text(file, content, lines, problems)
        elif file.kind == "json":
            of_all = yield from _read_json(file, content, lines, fields, problems)
        elif file.kind == "lines":
            of_all = yield from _read_lines(file, content, lines, unit.start, fields, problems)
        else:
            of_all = yield from _read_separated(file, content, lines, fields, problems)
        if of_all is not None:
            problems.leave_out(file.path, of_all, file.size)
        elif content.damage is not None:
            problems.leave_out(file.path, content.damage.reason, content.damage.lost)
    return None


class _Lines:
    """Iterates over (offset, line) of a file, or of a unit of a plain one; `rest` gives what is left in one piece."""

    def __init__(self, content: Content, file: InputFile, unit: Unit, digest: "hashlib._Hash | None") -> None:
        self.stream, self.digest = content.stream, digest
        self.offset = 0
        self.end: int | None = None
        self.mark_counts = file.kind != "json"
        if content.plain and file.kind == "lines":
            self.end = unit.end
            if unit.start:  # the line that crosses a unit's start belongs to the unit before
                self.stream.seek(unit.start - 1)
                self.stream.readline()
                self.offset = self.stream.tell()

    def __iter__(self) -> Iterator[Line]:
        stream, digest = self.stream, self.digest
        while self.end is None or self.offset < self.end:
            offset, line = self.offset, stream.readline()
            if not line:
                return
            if digest is not None:
                digest.update(line)
            if offset == 0 and line.startswith(BOM):
                line = line.removeprefix(BOM)
                self.offset += len(BOM) * self.mark_counts
            self.offset += len(line)
            yield offset, line

    def rest(self) -> bytes:
        """All that no line was made of yet, without a byte order mark."""
        data = self.stream.read()
        if self.digest is not None:
            self.digest.update(data)
        return data if self.offset else data.removeprefix(BOM)


def _of_text(content: Content, reason: str) -> str:
    """The reason, with the bytes that are meant where they are not those of the file."""
    return reason if content.plain else f"{reason} (bytes of text, as UTF-8)"


def _report_damage(content: Content, path: str, line: int, problems: Problems) -> None:
    if content.truncated:
        assert content.damage is not None
        problems.report(f"{path} line {line}", content.damage.place, content.damage.words)


def _report_undecodable(path: str, data: bytes, error: UnicodeDecodeError, problems: Problems) -> None:
    line = data.count(b"\n", 0, error.start) + 1
    problems.report(f"{path} line {line}", "invalid UTF-8", f"byte {data[error.start]:#04x}")


def _read_text(
    file: InputFile, content: Content, lines: _Lines, problems: Problems
) -> Generator[Document, None, str | None]:
    """Returns why all of the file is left out, if it is."""
    data, of_all = lines.rest(), None
    if content.truncated:
        data = data[: data.rfind(b"\n") + 1]
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        _report_undecodable(file.path, data, error, problems)
        of_all = "invalid UTF-8"
    else:
        if data or not content.truncated:
            yield Document(file.name, text)
        else:
            of_all = content.damaged_before_a_record
    _report_damage(content, file.path, data.count(b"\n") + 1, problems)
    return of_all


def _read_lines(
    file: InputFile, content: Content, lines: Iterable[Line], start: int, fields: Fields, problems: Problems
) -> Generator[Document, None, str | None]:
    lines_before = 0 if start == 0 else None
    first_offset = number = 0

    def place() -> str:
        nonlocal lines_before
        if lines_before is None:
            lines_before = _count_lines(file.path, first_offset)
        return f"{file.path} line {lines_before + number + 1}"

    line = b""
    for number, (offset, line) in enumerate(lines):
        if number == 0:
            first_offset = offset
        if line.isspace():
            continue
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError) as error:
            if line.endswith(b"\n") or not content.truncated:  # else it is only the beginning of a record
                _report_line(place(), line, error, problems)
            continue
        document = checked_document(record, f"{file.name}#{offset}", fields, place, problems)
        if document is not None:
            yield document
    whole = number + line.endswith(b"\n")
    _report_damage(content, file.path, whole + 1, problems)
    return None if whole else content.damaged_before_a_record


def _report_line(place: str, line: bytes, error: Exception, problems: Problems) -> None:
    if isinstance(error, UnicodeDecodeError):
        problems.report(place, "invalid UTF-8", f"byte {line[error.start]:#04x} in column {error.start + 1}")
    else:
        problems.report(place, "invalid JSON", str(error).replace("line 1 ", ""))


def _count_lines(path: str, end: int) -> int:
    count = 0
    with open_file(path) as handle:
        while end > 0 and (block := handle.read(min(READ_BYTES, end))):
            count, end = count + block.count(b"\n"), end - len(block)
    return count


def _read_json(
    file: InputFile, content: Content, lines: _Lines, fields: Fields, problems: Problems
) -> Generator[Document, None, str | None]:
    """A list of objects, one object, or (as often found under this suffix, and read as it comes) one object a line."""
    each = iter(lines)
    first = list(_to_first_filled(each))
    following = list(_to_first_filled(each)) if _is_object(first) else []
    if following and not following[-1][1].isspace():
        return (yield from _read_lines(file, content, chain(first, following, each), 0, fields, problems))
    data = b"".join(line for _, line in first + following) + lines.rest()
    records, kept, error = _parse_json(data)
    for index, record in enumerate(records):
        place = f"{file.path} record {index}"
        document = checked_document(record, f"{file.name}#{index}", fields, place, problems)
        if document is not None:
            yield document
    if content.truncated:
        _report_damage(content, file.path, data.count(b"\n") + 1, problems)
        return None if kept else content.damaged_before_a_record
    if isinstance(error, UnicodeDecodeError):
        _report_undecodable(file.path, data, error, problems)
    elif error is not None:
        problems.report(f"{file.path} line {getattr(error, 'lineno', 1)}", "invalid JSON", str(error))
    if error is not None:
        problems.leave_out(file.path, _of_text(content, "behind damage in JSON"), len(data) - kept)
    return None


def _to_first_filled(lines: Iterator[Line]) -> Iterator[Line]:
    """Lines up to the first that is not blank."""
    for offset, line in lines:
        yield offset, line
        if not line.isspace():
            return


def _is_object(lines: list[Line]) -> bool:
    try:
        return bool(lines) and lines[-1][1].lstrip().startswith(b"{") and isinstance(json.loads(lines[-1][1]), dict)
    except (ValueError, RecursionError):
        return False


def _parse_json(data: bytes) -> tuple[list, int, Exception | None]:
    """The records of a JSON text, the bytes they take, and what is wrong; of a damaged list those before the damage."""
    error: Exception
    try:
        text = data.decode()
        content = json.loads(text)
    except UnicodeDecodeError as problem:
        error, text = problem, data[: problem.start].decode()
    except (ValueError, RecursionError) as problem:
        error = problem
    else:
        return (content if isinstance(content, list) else [content]), len(data), None
    records, kept = [], 0
    skip_space = json.decoder.WHITESPACE.match  # type: ignore[attr-defined]  # the stubs leave it out
    parse = json.JSONDecoder().raw_decode
    position, expected = skip_space(text).end(), "["
    try:
        while text[position] == expected:
            record, kept = parse(text, skip_space(text, position + 1).end())
            records.append(record)
            position, expected = skip_space(text, kept).end(), ","
    except (ValueError, RecursionError, IndexError):
        pass
    return records, len(text[:kept].encode()), error


def _read_separated(
    file: InputFile, content: Content, lines: _Lines, fields: Fields, problems: Problems
) -> Generator[Document, None, str | None]:
    """Rows of a .csv or .tsv file, whose first line names the columns; returns why all of it is left out, if it is."""
    csv.field_size_limit(sys.maxsize)
    decoded = (
        line.decode("utf-8", "surrogateescape") for _, line in lines if line.endswith(b"\n") or not content.truncated
    )
    rows = csv.reader(decoded, "excel-tab" if file.kind == "tsv" else "excel", strict=True)
    header: list[str] | None = None
    count = 0
    while True:
        place, begin = f"{file.path} line {rows.line_num + 1}", lines.offset
        try:
            row = next(rows, None)
        except csv.Error as error:
            if not content.truncated or content.stream.peek(1):  # else it is only the beginning of a record
                problems.report(place, "invalid CSV", str(error))
                problems.leave_out(file.path, _of_text(content, "invalid CSV"), lines.offset - begin)
            continue
        if row is None:
            break
        if header is None:
            header = row
            if problem := column_problem(header, fields):
                problems.report(place, problem)
                return "no usable column"
        elif row:
            if len(row) != len(header):
                problems.report(place, "wrong number of fields", f"{len(row)}, the header has {len(header)}")
            else:
                record = dict(zip(header, row, strict=True))
                document = checked_document(record, f"{file.name}#{count}", fields, place, problems)
                if document is not None:
                    yield document
            count += 1
    _report_damage(content, file.path, rows.line_num + 1, problems)
    return content.damaged_before_a_record if header is None else None
