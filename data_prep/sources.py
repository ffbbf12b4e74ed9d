"""Where documents come from: named sources, their files, and the units of work the files are cut into.

Everything here is decided before any document is read and depends on nothing but the names and sizes of the input
(and, for Parquet and Arrow, their row counts), so every process and every later run sees the same units.
"""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

FORMATS = {
    ".jsonl": "lines",
    ".jsonl.gz": "lines.gz",
    ".jsonl.zst": "lines.zst",
    ".json": "json",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
}
SUFFIXES = " ".join(FORMATS)
SOURCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
UNIT_FILES = 4096
UNIT_BYTES_LEAST, UNIT_BYTES_MOST, UNITS_WANTED = 1 << 22, 1 << 26, 256


class Source(NamedTuple):
    name: str
    weight: float | None
    places: tuple[str, ...]
    """Files, folders and globs."""


class InputFile(NamedTuple):
    path: str
    name: str
    """Place within its source, independent of where the input lies: the first part of document keys."""
    format: str
    size: int
    mtime_ns: int


class Unit(NamedTuple):
    """One piece of work: whole small files, a byte range of lines, or a range of row groups (record batches)."""

    index: int
    source: str
    first_file: int
    last_file: int  # exclusive
    start: int
    end: int
    first_row: int
    size: int


def hash64(text: str) -> int:
    """A fixed, well-mixed 64-bit number of a string."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def parse_sources(inputs: list[str], named: list[str]) -> list[Source]:
    """Sources of `--input PLACE...` (called "documents") and of `--source NAME=PLACE[:WEIGHT]`, a name may repeat."""
    places: dict[str, list[str]] = {"documents": list(inputs)} if inputs else {}
    weights: dict[str, float] = {}
    for text in named:
        name, equals, place = text.partition("=")
        if name == "all":
            raise ValueError(f'--source {text}: reports call all sources together "all"; choose another name')
        if not equals or not place or not SOURCE_NAME.fullmatch(name):
            raise ValueError(f"--source {text}: write NAME=PATH or NAME=PATH:WEIGHT, the name in letters and digits")
        head, colon, tail = place.rpartition(":")
        weight = _weight(tail) if colon and head else None
        if weight is not None:
            place = head
            if not 0 < weight < float("inf"):
                raise ValueError(f"--source {text}: a weight is a positive number")
            if weights.setdefault(name, weight) != weight:
                raise ValueError(f"--source {text}: source {name} was given weight {weights[name]:g} before")
        places.setdefault(name, []).append(place)
    if not places:
        raise ValueError("no input: give --input PATH... or --source NAME=PATH:WEIGHT")
    if weights and len(weights) < len(places):
        missing = ", ".join(name for name in places if name not in weights)
        raise ValueError(f"give a weight to every source or to none: {missing} has none")
    return [Source(name, weights.get(name), tuple(paths)) for name, paths in places.items()]


def _weight(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def plan_units(sources: list[Source], unit_bytes: int | None = None) -> tuple[list[Unit], list[InputFile]]:
    """The files of all sources, sorted by name within each, and the units they are cut into, in document order."""
    found = [(source.name, find_files(source)) for source in sources]
    total = sum(file.size for _, files in found for file in files)
    if unit_bytes is None:  # a power of two, so that growing inputs rarely change it
        wanted = 1 << max(0, (total // UNITS_WANTED).bit_length() - 1)
        unit_bytes = min(UNIT_BYTES_MOST, max(UNIT_BYTES_LEAST, wanted))
    units: list[Unit] = []
    everything: list[InputFile] = []
    for name, files in found:
        for cut in _cut(files, unit_bytes):
            first, last, start, end, row, size = cut
            base = len(everything)
            units.append(Unit(len(units), name, base + first, base + last, start, end, row, size))
        everything += files
    return units, everything


def _cut(files: list[InputFile], unit_bytes: int) -> Iterator[tuple[int, int, int, int, int, int]]:
    position = 0
    while position < len(files):
        file = files[position]
        if file.format in ("text", "json"):
            last, size = position, 0
            while last < len(files) and files[last].format == file.format and last - position < UNIT_FILES:
                if size and size + files[last].size > unit_bytes:
                    break
                size += files[last].size
                last += 1
            yield position, last, 0, 0, 0, size
            position = last
            continue
        if file.format == "lines":
            pieces = max(1, round(file.size / unit_bytes))
            edges = [file.size * piece // pieces for piece in range(pieces + 1)]
            for start, end in pairwise(edges):
                yield position, position + 1, start, end, 0, end - start
        elif file.format in ("parquet", "arrow"):
            for start, end, row, size in _row_ranges(file, unit_bytes):
                yield position, position + 1, start, end, row, size
        else:
            yield position, position + 1, 0, file.size, 0, file.size
        position += 1


def _row_ranges(file: InputFile, unit_bytes: int) -> Iterator[tuple[int, int, int, int]]:
    """Ranges (first group, last group, first row, bytes) of about `unit_bytes`; at least one, also for an empty file."""
    try:
        groups = _parquet_groups(file.path) if file.format == "parquet" else _arrow_groups(file.path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file.path} is not a readable {file.format} file: {error}") from None
    start = row = rows = size = 0
    for number, (group_rows, group_size) in enumerate(groups):
        rows, size = rows + group_rows, size + group_size
        if size >= unit_bytes or number == len(groups) - 1:
            yield start, number + 1, row, size
            start, row, rows, size = number + 1, row + rows, 0, 0
    if not groups:
        yield 0, 0, 0, 0


def _parquet_groups(path: str) -> list[tuple[int, int]]:
    with pq.ParquetFile(path) as file:
        groups = (file.metadata.row_group(number) for number in range(file.metadata.num_row_groups))
        return [(group.num_rows, group.total_byte_size) for group in groups]


def _arrow_groups(path: str) -> list[tuple[int, int]]:
    with pa.memory_map(path) as file, pa.ipc.open_stream(file) as stream:
        return [(batch.num_rows, batch.nbytes) for batch in stream]


def find_files(source: Source) -> list[InputFile]:
    """Supported files of a source in the order of their names, each real file once."""
    chosen: dict[str, tuple[str, str, str]] = {}
    for place in source.places:
        matches = [place] if os.path.lexists(place) else sorted(glob.glob(place, recursive=True))  # noqa: PTH207 (absolute patterns)
        if not matches:
            raise ValueError(f"there is no file or folder {place} (source {source.name})")
        before, fixed = len(chosen), Path(place)
        if matches != [place]:
            fixed = Path(*fixed.parts[: next(i for i, part in enumerate(fixed.parts) if glob.has_magic(part))])
        for match in matches:
            anchor = fixed if matches != [place] else Path(match)
            for path, format_ in _walk(Path(match), explicit=matches == [place]):
                name = path.name if path == anchor else path.relative_to(anchor).as_posix()
                chosen.setdefault(os.path.realpath(path), (name, str(path), format_))
        if len(chosen) == before and not any(os.path.realpath(match) in chosen for match in matches):
            raise ValueError(f"{place} holds no new document files (known: {SUFFIXES}, saved `datasets` folders)")
    files: list[InputFile] = []
    taken: dict[str, int] = {}
    for name, path, format_ in sorted(chosen.values()):
        stat = Path(path).stat()
        name = name.encode("utf-8", "backslashreplace").decode()
        taken[name] = taken.get(name, 0) + 1
        unique = name if taken[name] == 1 else f"{name}@{taken[name]}"
        files.append(InputFile(str(Path(path).absolute()), unique, format_, stat.st_size, stat.st_mtime_ns))
    return files


def _walk(path: Path, explicit: bool) -> Iterator[tuple[Path, str]]:
    if path.is_file():
        format_ = file_format(path.name)
        if format_ is None and explicit:
            raise ValueError(f"{path} has none of the known suffixes ({SUFFIXES})")
        if format_ is not None:
            yield path, format_
    elif path.is_dir():
        visited: set[str] = set()
        for folder, folders, names in os.walk(path, followlinks=True):
            if os.path.realpath(folder) in visited:
                folders.clear()
                continue
            visited.add(os.path.realpath(folder))
            if {"state.json", "dataset_info.json"} <= set(names):
                folders.clear()
                yield from ((Path(folder, name), "arrow") for name in _dataset_files(Path(folder, "state.json")))
                continue
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                if not name.startswith(".") and name != "dataset_dict.json" and (format_ := file_format(name)):
                    yield Path(folder, name), format_
    else:
        raise ValueError(f"{path} is neither a file nor a folder")


def _dataset_files(state: Path) -> list[str]:
    try:
        return [entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{state} does not describe a saved `datasets` folder") from None


def file_format(name: str) -> str | None:
    name = name.lower()
    return next((format_ for suffix, format_ in FORMATS.items() if name.endswith(suffix)), None)
