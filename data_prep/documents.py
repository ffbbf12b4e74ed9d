"""Reading the documents of one unit of work: strict, streaming, with a place for every complaint.

A document's key is its id field, or where it stands: `file#byte-offset` for lines (compressed ones: in the text
after decompression), `file#row` for tables and JSON lists, and just `file` where a file is one document.
"""

import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from data_prep.sources import InputFile, Unit

READ_BYTES = 1 << 20
TABLE_ROWS = 64
EXAMPLES_KEPT = 20
BOM = b"\xef\xbb\xbf"


class Document(NamedTuple):
    key: str
    text: str


class Problems:
    """What is wrong with the input: raised at once (`fail`) or counted by reason and left out (`skip`)."""

    def __init__(self, on_error: str):
        self.on_error = on_error
        self.reasons: Counter[str] = Counter()
        self.examples: list[str] = []

    @property
    def count(self) -> int:
        return self.reasons.total()

    def report(self, place: str, reason: str, detail: str = "") -> None:
        words = f"{place}: {reason}" + (f" ({detail})" if detail else "")
        if self.on_error == "fail":
            raise ValueError(f"{words}; --on-error skip leaves such records out")
        self.reasons[reason] += 1
        if len(self.examples) < EXAMPLES_KEPT:
            self.examples.append(words)


class Fields(NamedTuple):
    text: str
    key: str | None


def read_unit(
    unit: Unit, files: list[InputFile], text_field: str, id_field: str | None, problems: Problems, digest=None
) -> Iterator[Document]:
    """Yield the unit's documents in order; `digest`, a hashlib object, is fed the unit's input bytes."""
    fields = Fields(text_field, id_field)
    for file in files[unit.first_file : unit.last_file]:
        if digest is not None:
            digest.update(f"{file.format} {file.size}\n".encode())
        _check_unchanged(file)
        if file.format == "text":
            yield from _read_text(file, problems, digest)
        elif file.format == "json":
            yield from _read_json(file, fields, problems, digest)
        elif file.format in ("parquet", "arrow"):
            yield from _read_table(file, unit, fields, problems, digest)
        else:
            yield from _read_lines(file, unit, fields, problems, digest)
        _check_unchanged(file)


def _check_unchanged(file: InputFile) -> None:
    stat = Path(file.path).stat()
    if (stat.st_size, stat.st_mtime_ns) != (file.size, file.mtime_ns):
        raise ValueError(f"{file.path} changed while the data set was being built: run the command again")


def _read_whole(file: InputFile, digest) -> bytes:
    data = Path(file.path).read_bytes()
    if digest is not None:
        digest.update(data)
    return data.removeprefix(BOM)


def _read_text(file: InputFile, problems: Problems, digest) -> Iterator[Document]:
    data = _read_whole(file, digest)
    try:
        yield Document(file.name, data.decode())
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problems.report(f"{file.path} line {line}", "invalid UTF-8", f"byte {data[error.start]:#04x}")


def _read_json(file: InputFile, fields: Fields, problems: Problems, digest) -> Iterator[Document]:
    """A list of objects, one object, or (as often found under this suffix) one object a line."""
    data = _read_whole(file, digest)
    try:
        content = json.loads(data.decode())
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return problems.report(f"{file.path} line {line}", "invalid UTF-8", f"byte {data[error.start]:#04x}")
    except (ValueError, RecursionError) as error:
        if data.lstrip()[:1] == b"{" and "Extra data" in str(error):
            yield from _parse_lines(file, _with_offsets(io.BytesIO(data), 0), 0, fields, problems)
            return None
        return problems.report(f"{file.path} line {getattr(error, 'lineno', 1)}", "invalid JSON", str(error))
    for index, record in enumerate(content if isinstance(content, list) else [content]):
        document = _document(record, f"{file.name}#{index}", fields, f"{file.path} record {index}", problems)
        if document is not None:
            yield document
    return None


def _read_lines(file: InputFile, unit: Unit, fields: Fields, problems: Problems, digest) -> Iterator[Document]:
    with Path(file.path).open("rb", buffering=READ_BYTES) as raw:
        stream = raw
        if file.format == "lines.gz":
            stream = io.BufferedReader(gzip.GzipFile(fileobj=raw), READ_BYTES)
        elif file.format == "lines.zst":
            stream = io.BufferedReader(_ZstdReader(raw), READ_BYTES)
        elif unit.start:  # the line that crosses a unit's start belongs to the unit before
            raw.seek(unit.start - 1)
            raw.readline()
        end = unit.end if file.format == "lines" else None
        lines = _with_offsets(stream, raw.tell() if stream is raw else 0, end, digest)
        yield from _parse_lines(file, lines, unit.start, fields, problems)


def _with_offsets(stream, offset: int, end: int | None = None, digest=None) -> Iterator[tuple[int, bytes]]:
    """Lines that begin before `end`, each with the offset at which it begins."""
    while end is None or offset < end:
        line = stream.readline()
        if not line:
            return
        if digest is not None:
            digest.update(line)
        yield offset, line
        offset += len(line)


def _parse_lines(
    file: InputFile, lines: Iterator[tuple[int, bytes]], start: int, fields: Fields, problems: Problems
) -> Iterator[Document]:
    lines_before = 0 if start == 0 else None

    def place() -> str:
        nonlocal lines_before
        if lines_before is None:
            lines_before = _count_lines(file.path, first_offset)
        return f"{file.path} line {lines_before + number + 1}"

    first_offset = number = 0
    for number, (offset, line) in enumerate(_until_damage(lines, place, problems)):
        if number == 0:
            first_offset = offset
        line = line.removeprefix(BOM) if offset == 0 else line
        if line.isspace():
            continue
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            problems.report(place(), "invalid UTF-8", f"byte {line[error.start]:#04x} in column {error.start + 1}")
            continue
        except (ValueError, RecursionError) as error:
            problems.report(place(), "invalid JSON", str(error).replace("line 1 ", ""))
            continue
        document = _document(record, f"{file.name}#{offset}", fields, place, problems)
        if document is not None:
            yield document


def _until_damage(lines: Iterator, place, problems: Problems) -> Iterator:
    try:
        yield from lines
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        problems.report(place(), "damaged compressed file, rest unreadable", str(error))


def _count_lines(path: str, end: int) -> int:
    count = 0
    with Path(path).open("rb") as handle:
        while end > 0 and (block := handle.read(min(READ_BYTES, end))):
            count, end = count + block.count(b"\n"), end - len(block)
    return count


def _read_table(file: InputFile, unit: Unit, fields: Fields, problems: Problems, digest) -> Iterator[Document]:
    if digest is not None and unit.start == 0:  # the file's first unit vouches for all of it
        with Path(file.path).open("rb") as handle:
            while block := handle.read(READ_BYTES):
                digest.update(block)
    row = unit.first_row
    for batch in _table_batches(file, unit, [name for name in fields if name is not None]):
        texts, keys = batch.column(0), batch.column(1) if fields.key is not None else None
        for index in range(batch.num_rows):
            place = f"{file.path} row {row}"
            try:
                record = {fields.text: texts[index].as_py()}
                if keys is not None:
                    record[fields.key] = keys[index].as_py()
            except UnicodeDecodeError:
                problems.report(place, "invalid UTF-8")
            else:
                document = _document(record, f"{file.name}#{row}", fields, place, problems)
                if document is not None:
                    yield document
            row += 1


def _table_batches(file: InputFile, unit: Unit, columns: list[str]) -> Iterator[pa.RecordBatch]:
    try:
        if file.format == "parquet":
            with pq.ParquetFile(file.path, memory_map=True) as table:
                _check_columns(file, table.schema_arrow.names, columns)
                groups = list(range(unit.start, unit.end))
                for batch in table.iter_batches(TABLE_ROWS, row_groups=groups, columns=columns, use_threads=False):
                    yield batch.select(columns)
        else:
            with pa.memory_map(file.path) as mapped, pa.ipc.open_stream(mapped) as stream:
                _check_columns(file, stream.schema.names, columns)
                for number, batch in enumerate(stream):
                    if unit.start <= number < unit.end:
                        yield batch.select(columns)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"{file.path} cannot be read: {error}") from None


def _check_columns(file: InputFile, present: list[str], wanted: list[str]) -> None:
    for name in wanted:
        if name not in present:
            raise ValueError(f"{file.path} has no column {name!r}: it has {', '.join(present)} (see --text-field)")


def _document(record, place_key: str, fields: Fields, place, problems: Problems) -> Document | None:
    """Check one record; `place` is a string or a function that returns it."""
    reason = detail = None
    text, key = None, place_key
    if not isinstance(record, dict):
        reason = "not a JSON object"
    elif fields.text not in record:
        reason, detail = f"no field {fields.text!r}", f"it has {', '.join(list(record)[:8])}"
    elif not isinstance(text := record[fields.text], str):
        reason = f"field {fields.text!r} is not text"
    elif not _encodable(text):
        reason = "invalid UTF-8"
    elif fields.key is not None:
        key = record.get(fields.key)
        if isinstance(key, bool) or not isinstance(key, str | int) or not _encodable(str(key)):
            reason = f"field {fields.key!r} is missing or not usable as an id"
    if reason is None:
        return Document(str(key), text)
    problems.report(place if isinstance(place, str) else place(), reason, detail or "")
    return None


def _encodable(text: str) -> bool:
    """False for lone surrogates, which JSON escapes can spell but UTF-8 cannot hold."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class _ZstdReader(io.RawIOBase):
    """Frames one after another, as `zstd` and `cat` write them; a truncated one is an error."""

    def __init__(self, raw: io.BufferedIOBase):
        self._raw, self._frame, self._left = raw, None, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._left:
            block = (self._frame.unused_data if self._frame and self._frame.eof else b"") or self._raw.read(READ_BYTES)
            if not block:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("it ends in the middle of a zstd frame")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._left = self._frame.decompress(block)
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size
