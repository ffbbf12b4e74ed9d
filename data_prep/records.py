"""What every reader of documents shares: the document, the check of one record, and the place for every complaint."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, Self

EXAMPLES_KEPT = 20
SOURCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class InputFile(NamedTuple):
    path: str
    name: str
    """Place within its source, independent of where the input lies: the first part of document keys."""
    format: str
    """By its name: a kind, and behind a dot the compression."""
    size: int
    mtime_ns: int
    """When it was changed; of a file elsewhere a number that changes with it."""

    @property
    def kind(self) -> str:
        """What it is once it is decompressed."""
        return self.format.partition(".")[0]

    @property
    def compression(self) -> str | None:
        return self.format.partition(".")[2] or None


class Unit(NamedTuple):
    """One piece of work: whole small files, a byte range of lines, or a range of row groups (record batches)."""

    index: int  # type: ignore[assignment]  # hides that of tuples
    source: str
    first_file: int
    last_file: int  # exclusive
    start: int
    end: int
    first_row: int
    size: int


Stretch = tuple[int, int]
"""Characters of a text, from and to (exclusive)."""


class Rendered(NamedTuple):
    """A conversation as a text."""

    text: str
    targets: list[Stretch]
    """What carries loss."""
    literal: list[Stretch]
    """Spellings of control tokens that are text; others are these tokens."""


class Document(NamedTuple):
    key: str
    text: str


class SourcedDocument(Document):
    """A document whose record may name what it is a part of."""

    source: str | None

    def __new__(cls, key: str, text: str, source: str | None) -> Self:
        self = super().__new__(cls, key, text)
        self.source = source
        return self


class Conversation(SourcedDocument):
    """A document of which a part carries loss."""

    chat: Rendered

    def __new__(cls, key: str, chat: Rendered, source: str | None = None) -> Self:
        self = super().__new__(cls, key, chat.text, source)
        self.chat = chat
        return self


class Renderer(Protocol):
    """Makes conversations into texts (data_prep/chat.py)."""

    @property
    def columns(self) -> dict[str, str]:
        """The fields that are read, and the options that name them."""

    def render(self, record: dict[str, Any]) -> Rendered:
        """Of a record that has these fields. Raises BadRecord."""


class Fields(NamedTuple):
    text: str
    key: str | None
    chat: Renderer | None = None
    source: str | None = None

    @property
    def content(self) -> dict[str, str]:
        """The fields that the text is made of, and the options that name them."""
        return self.chat.columns if self.chat else {self.text: "--text-field"}

    @property
    def columns(self) -> dict[str, str]:
        """All fields that are read, and the options that name them."""
        others = {self.key: "--id-field", self.source: "--source-field"}
        return self.content | {name: flag for name, flag in others.items() if name and name not in self.content}


class LeftOut(NamedTuple):
    """A file, a folder of `files` of them, or a part of a file that holds no documents for us, and why."""

    path: str
    reason: str
    size: int
    files: int = 1


class Filtered(NamedTuple):
    """A document that a filter left out, and what it said."""

    key: str
    filter: str
    reason: str


class BadInput(ValueError):
    """Something of the input cannot be read, and that was not to be left out."""


class BadRecord(Exception):
    """A record that no document can be made of: its place is added by whoever knows it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Problems:
    """What is wrong with the input: raised at once (`fail`) or counted by reason and left out (`skip`)."""

    def __init__(self, on_error: str) -> None:
        self.on_error = on_error
        self.reasons: Counter[str] = Counter()
        self.examples: list[str] = []
        self.left_out: list[LeftOut] = []

    @property
    def count(self) -> int:
        return self.reasons.total()

    def report(self, place: str, reason: str, detail: str = "") -> None:
        """Count something that is left out, or raise BadInput."""
        words = printable(f"{place}: {reason}" + (f" ({detail})" if detail else ""))
        if self.on_error == "fail":
            raise BadInput(f"{words}; --on-error skip leaves such records out")
        self.reasons[printable(reason)] += 1
        if len(self.examples) < EXAMPLES_KEPT:
            self.examples.append(words)

    def leave_out(self, path: str, reason: str, size: int) -> None:
        """Count bytes of a file that are not read, perhaps none that are there; no error by itself."""
        self.left_out.append(LeftOut(printable(path), reason, size))


def printable(text: str) -> str:
    """The text with what UTF-8 cannot hold (half a surrogate pair, a byte of a file's name) spelled out."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def checked_document(
    record: Any, place_key: str, fields: Fields, place: str | Callable[[], str], problems: Problems
) -> Document | None:
    """The document of one record; `place` is a string or a function that returns it."""
    try:
        return _document(record, place_key, fields)
    except BadRecord as error:
        problems.report(place if isinstance(place, str) else place(), error.reason, error.detail)
        return None


def _document(record: Any, place_key: str, fields: Fields) -> Document:
    if not isinstance(record, dict):
        raise BadRecord("not a JSON object")
    for name in fields.content:
        if name not in record:
            raise BadRecord(f"no field {name!r}", f"it has {', '.join(list(record)[:8])}")
    chat = fields.chat.render(record) if fields.chat else None
    text = chat.text if chat else record[fields.text]
    if not isinstance(text, str):
        raise BadRecord(f"field {fields.text!r} is not text")
    if not _encodable(text):
        raise BadRecord("invalid UTF-8")
    key: Any = place_key
    if fields.key is not None:
        key = record.get(fields.key)
        if isinstance(key, bool) or not isinstance(key, str | int) or not _encodable(str(key)):
            raise BadRecord(f"field {fields.key!r} is missing or not usable as an id")
    source = None if fields.source is None else _source(record.get(fields.source), fields.source)
    if chat:
        return Conversation(str(key), chat, source)
    return Document(str(key), text) if source is None else SourcedDocument(str(key), text, source)


def _source(value: Any, field: str) -> str:
    text = str(value)
    if not isinstance(value, str | int) or isinstance(value, bool) or text == "all" or not SOURCE_NAME.fullmatch(text):
        said = (
            "it is missing"
            if value is None
            else f"{text[:40]!r}: a name has letters, digits, ., - and _, and is not all"
        )
        raise BadRecord(f"field {field!r} names no source", said)
    return text


def _encodable(text: str) -> bool:
    """False for lone surrogates, which JSON escapes can spell but UTF-8 cannot hold."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def column_problem(present: list[str], fields: Fields) -> str | None:
    """Why a table with columns of these names cannot be read: one is missing or there twice."""
    for name, flag in fields.columns.items():
        count = present.count(name)
        if not count:
            return f"no column {name!r}: it has {', '.join(present) or 'none'} (see {flag})"
        if count > 1:
            return f"{count} columns are called {name!r}: rename all but one, or choose another ({flag})"
    return None
