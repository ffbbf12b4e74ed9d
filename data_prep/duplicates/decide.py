"""Which documents and sections repeat an earlier one: candidates verified by the exact similarity of their n-grams.

In document order, what has a verified twin among what is kept before it is left out, and named with that twin: no
chain of likenesses leads to a document that has no like among those that stay. The result depends on the token store
and the settings alone.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from console.progress import Progress
from data_prep.duplicates.candidates import Items
from data_prep.duplicates.ngrams import Grams, jaccard
from data_prep.duplicates.sketch import SLOTS
from data_prep.ledger import unit_path
from data_prep.unit_file import UnitFile

OPEN_UNITS, HELD_TOKENS, PAIRS_AT_ONCE, FOUND_AT_ONCE = 64, 1 << 22, 1 << 18, 1 << 16
DEVIATIONS = 4
"""A pair as similar as the threshold is lost, once in 30,000 times, where its sketches differ by more standard deviations."""


REPETITION = np.dtype(
    [(name, np.int64) for name in ("doc", "begin", "end", "of", "length", "nbytes")] + [("value", np.float64)]
)
"""A stretch of tokens of a document of this length that document `of` has in an earlier one, so similar."""


class _Item(NamedTuple):
    doc: int
    begin: int
    end: int
    length: int
    grams: Grams


class Deciding:
    """Decides over the sketched items of one level; `documents[u]` is the number of documents in unit u, `sizes[id]` the
    bytes of text of a token; `progress` counts `item_bytes` an item."""

    def __init__(
        self,
        tokens: Path,
        documents: Sequence[int],
        items: Items,
        ngram: int,
        sizes: np.ndarray,
        progress: Progress,
        item_bytes: float,
    ) -> None:
        self.items, self.ngram, self.sizes, self.progress, self.item_bytes = items, ngram, sizes, progress, item_bytes
        self.first_doc = np.cumsum([0, *documents], dtype=np.int64)
        self._held, self._held_tokens = OrderedDict[int, _Item](), 0
        self._opened = lru_cache(OPEN_UNITS)(lambda unit: UnitFile(unit_path(tokens, unit)))
        self._columns = lru_cache(OPEN_UNITS)(
            lambda unit: tuple(items.column(name, unit) for name in ("doc", "begin", "end"))
        )

    def repetitions(self, threshold: float, folder: Path, left_out: np.ndarray) -> Iterator[np.ndarray]:
        """REPETITION [found], in order, in pieces; `left_out`: documents (ascending) that are not compared at all.

        Candidates are sorted in `folder`, where a byte an item lies as well.
        """
        found = self._repetitions(threshold, folder, left_out)
        while len(piece := np.fromiter(islice(found, FOUND_AT_ONCE), REPETITION)):
            yield piece

    def _repetitions(self, threshold: float, folder: Path, left_out: np.ndarray) -> Iterator[tuple]:
        gone = np.asarray(np.memmap(folder / "run-gone", bool, "w+", shape=len(self.items)))
        passed = 0
        for later, earlier in self._promising(threshold, folder):
            for item, other in zip(later.tolist(), earlier.tolist(), strict=True):
                if gone[item] or gone[other]:
                    continue
                self.progress.advance(round((item - passed) * self.item_bytes))
                passed = item
                mine, theirs = self._item(item), self._item(other)
                gone[item], gone[other] = _contains(left_out, mine.doc), _contains(left_out, theirs.doc)
                if gone[item] or gone[other]:
                    continue
                if (value := jaccard(mine.grams, theirs.grams, threshold)) >= threshold:
                    gone[item] = True
                    nbytes = int(self.sizes[mine.grams.ids].sum())
                    yield mine.doc, mine.begin, mine.end, theirs.doc, mine.length, nbytes, value

    def _promising(self, threshold: float, folder: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Candidates (later, earlier; int64 [pairs] each) whose sketches are not too different for the threshold."""
        for found in self.items.pairs(folder):
            for first in range(0, len(found), PAIRS_AT_ONCE):
                pairs = found[first : first + PAIRS_AT_ONCE]
                sides = [(pairs >> np.uint64(32)).astype(np.int64), (pairs & np.uint64(0xFFFFFFFF)).astype(np.int64)]
                slots = [self.items.gathered("slots", side) for side in sides]
                sizes = [self.items.gathered("end", side) - self.items.gathered("begin", side) for side in sides]
                independent = np.clip(np.minimum(*sizes) / 2, 1, SLOTS)  # of few n-grams, one is in several slots
                deviation = np.sqrt(threshold * (1 - threshold) / independent)
                likely = np.mean(slots[0] == slots[1], axis=1) >= threshold - DEVIATIONS * deviation
                yield sides[0][likely], sides[1][likely]

    def _item(self, number: int) -> _Item:
        """An item; those that were asked for last are held, 2 at least and about HELD_TOKENS together."""
        if found := self._held.get(number):
            self._held.move_to_end(number)
            return found
        found = self._held[number] = self._read(number)
        self._held_tokens += len(found.grams.ids)
        while self._held_tokens > HELD_TOKENS and len(self._held) > 2:
            self._held_tokens -= len(self._held.popitem(last=False)[1].grams.ids)
        return found

    def _read(self, item: int) -> _Item:
        unit = int(np.searchsorted(self.items.starts, item, side="right")) - 1
        row = item - int(self.items.starts[unit])
        doc, begin, end = (int(column[row]) for column in self._columns(unit))
        ids = self._opened(unit).tokens(doc)
        return _Item(int(self.first_doc[unit]) + doc, begin, end, len(ids), Grams(ids[begin:end], self.ngram))


def _contains(ascending: np.ndarray, number: int) -> bool:
    place = int(np.searchsorted(ascending, number))
    return place < len(ascending) and int(ascending[place]) == number
