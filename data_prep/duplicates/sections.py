"""Sections of long documents: runs of whole paragraphs, the same wherever a chapter stands.

A section ends with the first paragraph (a blank line ends one) that makes it `least` tokens long. A paragraph of that
length always ends one, so two texts with a chapter in common soon have the same sections there, however they began.
Where there is no blank line for `LINES_AFTER` times as many tokens, the ends of lines count.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np

from data_prep.duplicates.ngrams import distinct

LINES_AFTER = 4
FOLLOWED_BACK = 3
"""Tokens of white space alone that are looked through for the line end before."""


class Texts(NamedTuple):
    """D documents behind one another, without what begins and ends them (BOS, EOS)."""

    ids: np.ndarray  # [tokens], with the tokens between the documents
    begin: np.ndarray  # int64 [D]
    end: np.ndarray  # int64 [D]


class Paragraphs:
    """Finds the ends of paragraphs and lines; `pieces[id]` are the bytes that a token adds to the text."""

    def __init__(self, pieces: list[bytes]) -> None:
        ends = [piece[len(piece.rstrip()) :].count(b"\n") for piece in pieces]
        self._newlines = np.array(ends, np.uint8).clip(max=2)
        self._blank = np.array([not piece.strip() and bool(piece) for piece in pieces], bool)
        self.sizes = np.array([len(piece) for piece in pieces], np.int64)

    def ends(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions behind the last token of paragraphs and of lines (every paragraph's among them)."""
        newlines, blank = self._newlines[ids], self._blank[ids]
        count = newlines.copy()
        through = blank.copy()
        for back in range(1, FOLLOWED_BACK + 1):
            count[back:] += newlines[:-back] * through[back:]
            through[back:] &= blank[:-back]
        goes_on = np.append(blank[1:] & (newlines[1:] > 0), False)
        return np.flatnonzero((count >= 2) & ~goes_on) + 1, np.flatnonzero((count >= 1) & ~goes_on) + 1


def sections(content: Texts, paragraphs: Paragraphs, least: int) -> Texts:
    """All documents cut into sections, in order; what is left at a document's end belongs to its last section."""
    ends, lines = paragraphs.ends(content.ids)
    ends = distinct(np.concatenate([ends, content.end]))
    place = np.searchsorted(ends, lines)
    lines, place = lines[place < len(ends)], place[place < len(ends)]
    starts = np.concatenate([[0], ends[:-1]])
    starts[np.searchsorted(ends, content.begin, side="right")[: len(content.begin)].clip(max=len(ends) - 1)] = (
        content.begin
    )
    ends = distinct(np.concatenate([ends, lines[(ends - starts)[place] > LINES_AFTER * least]]))
    following = np.searchsorted(ends, ends + least).tolist()
    first = np.searchsorted(ends, content.begin + least).tolist()
    last = np.searchsorted(ends, content.end).tolist()
    places, begins, stops = ends.tolist(), [], []
    for begin, end, at, final in zip(content.begin.tolist(), content.end.tolist(), first, last, strict=True):
        cuts = [begin]
        while at < final:
            cuts.append(places[at])
            at = following[at]
        if len(cuts) > 1 and end - cuts[-1] < least:
            cuts.pop()
        for start, stop in pairwise([*cuts, end]):
            begins.append(start)
            stops.append(stop)
    return Texts(content.ids, np.array(begins, np.int64), np.array(stops, np.int64))
