"""Which documents and sections repeat an earlier one: candidates verified by the exact similarity of their n-grams.

In document order, what has a verified twin among what is kept before it is left out, and named with that twin: no
chain of likenesses leads to a document that has no like among those that stay. The result depends on the token store
and the settings alone.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path

import numpy as np

from console.progress import Progress
from data_prep.duplicates.candidates import Items
from data_prep.duplicates.ngrams import BLOCK, Grams, distinct, jaccard, jaccards
from data_prep.duplicates.sketch import SLOTS
from data_prep.ledger import unit_path
from data_prep.unit_file import UnitFile

OPEN_UNITS, PAIRS_AT_ONCE, FOUND_AT_ONCE = 64, 1 << 18, 1 << 16
PAIRS_AHEAD = 1 << 12
"""Among so many pairs behind the one that is asked for, others are looked for to compare with it."""
NOT_COMPARED = -1.0
DEVIATIONS = 4
"""A pair as similar as the threshold is lost, once in 30,000 times, where its sketches differ by more standard deviations."""


REPETITION = np.dtype(
    [(name, np.int64) for name in ("doc", "begin", "end", "of", "length", "nbytes")] + [("value", np.float64)]
)
"""A stretch of tokens of a document of this length that document `of` has in an earlier one, so similar."""


Pairs = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Candidates: later, earlier, tokens of both; int64 [pairs] each."""


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
        self._opened = lru_cache(OPEN_UNITS)(lambda unit: UnitFile(unit_path(tokens, unit)))
        self._grams = lru_cache(2)(lambda number: Grams(self._texts(np.array([number]))[0], ngram))

    def repetitions(self, threshold: float, folder: Path, left_out: np.ndarray) -> Iterator[np.ndarray]:
        """REPETITION [found], in order, in pieces; `left_out`: documents (ascending) that are not compared at all.

        Candidates are sorted in `folder`, where a byte an item lies as well.
        """
        found = self._repetitions(threshold, folder, left_out)
        while part := list(islice(found, FOUND_AT_ONCE)):
            item, of, value = map(np.array, zip(*part, strict=True))
            rows = np.zeros(len(part), REPETITION)
            rows["doc"], rows["begin"], rows["end"] = self._places(item)
            rows["of"], rows["value"] = self._places(of)[0], value
            for row, ids in zip(rows, self._documents(rows["doc"]), strict=True):
                row["length"], row["nbytes"] = len(ids), self.sizes[ids[row["begin"] : row["end"]]].sum()
            yield rows

    def _repetitions(self, threshold: float, folder: Path, left_out: np.ndarray) -> Iterator[tuple[int, int, float]]:
        """(item, the earlier one, their similarity)"""
        gone = np.asarray(np.memmap(folder / "run-gone", bool, "w+", shape=len(self.items)))
        for unit, (first, last) in enumerate(pairwise(self.items.starts.tolist())):
            among = left_out[slice(*np.searchsorted(left_out, self.first_doc[unit : unit + 2]))]
            gone[first:last] = np.isin(self.first_doc[unit] + self.items.column("doc", unit), among)
        passed = 0
        for pairs in self._promising(threshold, folder, gone):
            similar = np.full(len(pairs[0]), NOT_COMPARED)
            for place, (item, other) in enumerate(zip(pairs[0].tolist(), pairs[1].tolist(), strict=True)):
                if gone[item] or gone[other]:
                    continue
                if similar[place] == NOT_COMPARED:
                    self.progress.advance(round((item - passed) * self.item_bytes))
                    passed = item
                    self._compare(pairs, similar, place, gone, threshold)
                if similar[place] >= threshold:
                    gone[item] = True
                    yield item, other, float(similar[place])

    def _compare(self, pairs: Pairs, similar: np.ndarray, place: int, gone: np.ndarray, threshold: float) -> None:
        """Write into `similar` that of the pair in this place, and of others behind it that will probably be asked for: of
        every item the next one, unless it is found to repeat something that stays. So many as a core's cache holds."""
        later, earlier, tokens = (column[place : place + PAIRS_AHEAD] for column in pairs)
        similar = similar[place : place + PAIRS_AHEAD]
        if tokens[0] > BLOCK:
            similar[0] = jaccard(self._grams(int(later[0])), self._grams(int(earlier[0])), threshold)
            return
        possible = ~(gone[later] | gone[earlier])
        repeats = distinct(later[possible & (similar >= threshold)])
        wanted = (
            possible & (similar == NOT_COMPARED) & (tokens <= BLOCK) & ~np.isin([later, earlier], repeats).any(axis=0)
        )
        wanted[0] = True
        chosen = np.flatnonzero(wanted)
        chosen = chosen[np.append(True, later[chosen[1:]] != later[chosen[:-1]])]
        chosen = chosen[np.cumsum(tokens[chosen]) <= BLOCK]
        items, sides = np.unique(np.stack([later[chosen], earlier[chosen]], axis=1), return_inverse=True)
        similar[chosen] = jaccards(self._texts(items), sides.reshape(-1, 2), self.ngram)

    def _promising(self, threshold: float, folder: Path, gone: np.ndarray) -> Iterator[Pairs]:
        """Candidates whose sketches are not too different for the threshold, of items that are not gone."""
        for found in self.items.pairs(folder):
            for first in range(0, len(found), PAIRS_AT_ONCE):
                pairs = found[first : first + PAIRS_AT_ONCE]
                sides = np.stack([pairs >> np.uint64(32), pairs & np.uint64(0xFFFFFFFF)]).astype(np.int64)
                sides = sides[:, ~gone[sides].any(axis=0)]
                slots = [self.items.gathered("slots", side) for side in sides]
                sizes = [self.items.gathered("end", side) - self.items.gathered("begin", side) for side in sides]
                independent = np.clip(np.minimum(*sizes) / 2, 1, SLOTS)  # of few n-grams, one is in several slots
                deviation = np.sqrt(threshold * (1 - threshold) / independent)
                likely = np.mean(slots[0] == slots[1], axis=1) >= threshold - DEVIATIONS * deviation
                yield sides[0][likely], sides[1][likely], (sizes[0] + sizes[1])[likely]

    def _places(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Documents of these items, and where the items begin and end in them: int64 [items] each."""
        units = np.searchsorted(self.items.starts, numbers, side="right") - 1
        doc, begin, end = (self.items.gathered(name, numbers) for name in ("doc", "begin", "end"))
        return self.first_doc[units] + doc, begin, end

    def _documents(self, docs: np.ndarray) -> Iterator[np.ndarray]:
        """The ids of whole documents."""
        units = np.searchsorted(self.first_doc, docs, side="right") - 1
        for unit, row in zip(units.tolist(), (docs - self.first_doc[units]).tolist(), strict=True):
            yield self._opened(unit).tokens(row)

    def _texts(self, numbers: np.ndarray) -> list[np.ndarray]:
        """The ids of these items."""
        docs, begin, end = self._places(numbers)
        edges = zip(self._documents(docs), begin.tolist(), end.tolist(), strict=True)
        return [ids[first:last] for ids, first, last in edges]
