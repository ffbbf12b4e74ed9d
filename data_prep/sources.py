"""Where documents come from: named sources, their files, and the units of work the files are cut into.

Everything here is decided before any document is read and depends on nothing but the names and sizes of the input, the first
bytes of a large one, and the row counts of tables, so every process and every later run sees the same units.
"""

import hashlib
from collections.abc import Iterator
from itertools import pairwise

from data_prep.content import Content
from data_prep.find import Source, find_files
from data_prep.formats import TABLES
from data_prep.records import SOURCE_NAME, InputFile, LeftOut, Unit
from data_prep.tables import table_groups

UNIT_FILES = 4096
UNIT_BYTES_LEAST, UNIT_BYTES_MOST, UNITS_WANTED = 1 << 22, 1 << 26, 256


def hash64(text: str) -> int:
    """A fixed, well-mixed 64-bit number of a string."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def key_prefix(seed: int, source: str) -> str:
    """What is hashed before the key of a document, so that seeds and sources are divided independently."""
    return f"{seed}\0{source}\0"


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


def plan_units(
    sources: list[Source], unit_bytes: int | None = None, on_error: str = "fail"
) -> tuple[list[Unit], list[InputFile], list[LeftOut]]:
    """The units of work in document order, the files that they are cut from, sorted by name within each source, and
    what lies among these without being read. `on_error`: as of `find_files`.
    """
    found = [(source.name, *find_files(source, on_error)) for source in sources]
    total = sum(file.size for _, files, _ in found for file in files)
    if unit_bytes is None:  # a power of two, so that growing inputs rarely change it
        wanted = 1 << max(0, (total // UNITS_WANTED).bit_length() - 1)
        unit_bytes = min(UNIT_BYTES_MOST, max(UNIT_BYTES_LEAST, wanted))
    units: list[Unit] = []
    everything: list[InputFile] = []
    for name, files, _ in found:
        for cut in _stretches(files, unit_bytes):
            first, last, start, end, row, size = cut
            base = len(everything)
            units.append(Unit(len(units), name, base + first, base + last, start, end, row, size))
        everything += files
    return units, everything, [entry for _, _, left_out in found for entry in left_out]


def _stretches(files: list[InputFile], unit_bytes: int) -> Iterator[tuple[int, int, int, int, int, int]]:
    position = 0
    while position < len(files):
        file = files[position]
        if file.kind in ("text", "json", "csv", "tsv"):
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
            if pieces > 1 and not _is_plain(file.path):
                pieces = 1
            edges = [file.size * piece // pieces for piece in range(pieces + 1)]
            for start, end in pairwise(edges):
                yield position, position + 1, start, end, 0, end - start
        elif file.kind in TABLES:
            for start, end, row, size in _row_ranges(file, unit_bytes):
                yield position, position + 1, start, end, row, size
        else:
            yield position, position + 1, 0, file.size, 0, file.size
        position += 1


def _is_plain(path: str) -> bool:
    """Can it be cut at any byte? What is compressed or in another encoding, whatever its name says, cannot."""
    try:
        with Content(path) as content:
            return content.plain
    except OSError:
        return False


def _row_ranges(file: InputFile, unit_bytes: int) -> Iterator[tuple[int, int, int, int]]:
    """Ranges (first group, last group, first row, bytes) of about `unit_bytes`; at least one, also for an empty file."""
    groups = table_groups(file.path, file.format)
    start = row = rows = size = 0
    for number, (group_rows, group_size) in enumerate(groups):
        rows, size = rows + group_rows, size + group_size
        if size >= unit_bytes or number == len(groups) - 1:
            yield start, number + 1, row, size
            start, row, rows, size = number + 1, row + rows, 0, 0
    if not groups:
        yield 0, 0, 0, 0
