"""Where documents longer than a row are cut: windows of fixed length, or windows that end where the text pauses.

A cut lies between two tokens. Its kind is what the text before it ends with (spaces and tabs aside):

    paragraph   a blank line
    line        a line end
    sentence    . ! ? before white space, or one of … 。 ！ ？ ； ｡, and after either any closing quotes and brackets
    hard        none of these: the cut is in the middle of a sentence

Everything is decided from ids, by what each adds to the text (data_prep/token_bytes.py), so the same tokens and policy
always give the same windows; only the text around a possible cut is looked at.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import NamedTuple, Protocol

import numpy as np

from storage.manifest import PackingPolicy

KINDS = ("paragraph", "line", "sentence", "hard")

BLANK, NEWLINE = b" \t\r\v\f", b"\n"
STOPS = "".join(LATIN_STOPS := ".!?") + (OTHER_STOPS := "…。！？；｡")
CLOSERS = "\"'”’»›)]}」』】》〉）］｝〕〗"


def _any_of(characters: str) -> bytes:
    return b"(?:" + b"|".join(re.escape(character.encode()) for character in characters) + b")"


BLANK_LINE = re.compile(rb"\n[ \t\r\v\f]*(?=\n)")
STOP_RUN = re.compile(_any_of(STOPS) + _any_of(STOPS + CLOSERS) + b"*")
OTHER_STOP = re.compile(_any_of(OTHER_STOPS))
UNDECIDED = BLANK + NEWLINE + (STOPS + CLOSERS).encode()
"""A text of these bytes alone, with less than two line ends, does not show what it continues."""
CHARACTER_BYTES = 4
NEAR_TOKENS, FAR_TOKENS = 8, 4096
"""Tokens before a possible cut that are looked at: usually, and in blank lines and rows of dots without an end."""


class Windows(NamedTuple):
    """The pieces that documents are packed as, in document order."""

    doc: np.ndarray  # int64 [pieces]
    off: np.ndarray  # int64 [pieces]
    len: np.ndarray  # int64 [pieces]
    ctx: np.ndarray  # int64 [pieces]: leading tokens that the piece before ends with


class MeasuredDocuments(Protocol):
    length: np.ndarray
    """int64 [N]"""

    def tokens(self, i: int) -> np.ndarray:
        """Ids of document i [its length]."""


class Breaks:
    """Finds the pauses of a text in its ids; `pieces[id]` are the bytes that an id adds to the text."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces
        self._sizes = np.array([len(piece) for piece in pieces], np.int64)

    def kind(self, ids: np.ndarray, position: int) -> str:
        """Kind of a cut between tokens `position - 1` and `position`."""
        return self.best(ids, position, position)[1]

    def best(self, ids: np.ndarray, low: int, high: int, last: bool = True) -> tuple[int, str]:
        """Position and kind of the best cut in [low, high] (1 <= low <= high < len(ids)).

        The last (or first) paragraph end, else the last line end, else the last sentence end, each at the first token
        boundary behind it; else `high` (or `low`).
        """
        text, bounds = self._surroundings(ids, low, high)
        for kind, ends in (("paragraph", _paragraph_ends), ("line", _line_ends), ("sentence", _sentence_ends)):
            for end in ends(text) if not last else reversed(list(ends(text))):
                place = int(bounds.searchsorted(end))
                if place < len(bounds) and not text[end : bounds[place]].strip(BLANK):
                    return low + place, kind
                if last and not place:
                    break  # the earlier ones are further off
        return (high if last else low), "hard"

    def _surroundings(self, ids: np.ndarray, low: int, high: int) -> tuple[bytes, np.ndarray]:
        """Text around tokens low .. high, and where in it each of these tokens begins."""
        before, after = NEAR_TOKENS, CHARACTER_BYTES
        while True:
            begin, end = max(0, low - before), min(len(ids), high + after)
            text = b"".join([self.pieces[i] for i in ids[begin:end].tolist()])
            bounds = self._sizes[ids[begin:high]].cumsum()[low - begin - 1 :]
            lead, rest = text[: bounds[0]], len(text) - bounds[-1]
            undecided = begin and lead.count(NEWLINE) < 2 and not lead.strip(UNDECIDED)
            unfinished = end < len(ids) and rest < CHARACTER_BYTES
            if max(before, after) >= FAR_TOKENS or not (undecided or unfinished):
                return text, bounds
            before, after = (before * 4 if undecided else before), (after * 4 if unfinished else after)


def _paragraph_ends(text: bytes) -> Iterator[int]:
    return (match.end() + 1 for match in BLANK_LINE.finditer(text))


def _line_ends(text: bytes) -> Iterator[int]:
    return (match.end() for match in re.finditer(NEWLINE, text))


def _sentence_ends(text: bytes) -> Iterator[int]:
    for match in STOP_RUN.finditer(text):
        follows = text[match.end() : match.end() + 1]
        if (follows and follows in BLANK + NEWLINE) or OTHER_STOP.search(match[0]):
            yield match.end()


def fixed_windows(lengths: np.ndarray, policy: PackingPolicy) -> Windows:
    """Windows of `row_tokens` that begin `policy.overlap` tokens before the end of the one before."""
    stride = policy.row_tokens - policy.overlap
    further = -(-np.maximum(lengths - policy.row_tokens, 0) // stride)
    doc = np.repeat(np.arange(len(lengths)), further + 1)
    number = np.arange(len(doc)) - np.repeat(np.cumsum(further + 1) - (further + 1), further + 1)
    off = number * stride
    size = np.minimum(lengths[doc] - off, policy.row_tokens)
    return Windows(doc, off, size, np.where(number > 0, policy.overlap, 0))


def structure_windows(
    documents: MeasuredDocuments, policy: PackingPolicy, breaks: Breaks, advance: Callable[[int], None] | None = None
) -> Windows:
    """Windows of at most `row_tokens` that end at the best cut within the policy's tolerance.

    `advance` is called with the tokens of each document that was cut.
    """
    lengths = np.asarray(documents.length, np.int64)
    short = np.flatnonzero(lengths <= policy.row_tokens)
    zeros = np.zeros_like(short)
    parts = [np.stack([short, zeros, lengths[short], zeros], axis=1)]
    for doc in np.flatnonzero(lengths > policy.row_tokens).tolist():
        windows = np.array(list(_cut(documents.tokens(doc), policy, breaks)), np.int64)
        parts.append(np.column_stack([np.full(len(windows), doc), windows]))
        if advance:
            advance(int(lengths[doc]))
    table = np.concatenate(parts)
    return Windows(*np.ascontiguousarray(table[np.argsort(table[:, 0], kind="stable")].T))


def _cut(ids: np.ndarray, policy: PackingPolicy, breaks: Breaks) -> Iterator[tuple[int, int, int]]:
    """Offset, length and context of each window of a document longer than a row."""
    start = context = 0
    while len(ids) - start > policy.row_tokens:
        high = start + policy.row_tokens
        end, _ = breaks.best(ids, max(high - policy.cut_tolerance_tokens, start + context + 1), high)
        yield start, end - start, context
        context = policy.overlap
        if context > 1:
            context = end - breaks.best(ids, end - context, end - -(-context // 2), last=False)[0]
        start = end - context
    yield start, len(ids) - start, context


def count_cuts(
    documents: MeasuredDocuments,
    doc: np.ndarray,
    end: np.ndarray,
    breaks: Breaks,
    advance: Callable[[int], None] | None = None,
) -> dict[str, int]:
    """Cuts by kind, of pieces of the documents `doc` that end before token `end`: those that are not their last."""
    inside = np.flatnonzero(end < np.asarray(documents.length)[doc])
    order = inside[np.lexsort((end[inside], doc[inside]))]
    counts: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    pairs = zip(doc[order].tolist(), end[order].tolist(), strict=True)
    for i, cuts in groupby(pairs, key=lambda pair: pair[0]):
        ids = documents.tokens(i)
        counts.update(breaks.kind(ids, position) for _, position in cuts)
        if advance:
            advance(len(ids))
    return dict(counts)
