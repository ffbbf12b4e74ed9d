"""n-grams of tokens: a hash of each, and how much two texts share of theirs."""

from collections.abc import Sequence
from functools import cache, cached_property

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

BLOCK = 1 << 18
"""n-grams hashed at a time: what they need stays in a core's cache."""
BASE, BASE_INVERSE = 0x9E3779B97F4A7C15, pow(0x9E3779B97F4A7C15, -1, 1 << 64)
COMPARED = 1 << 16
"""n-grams of two texts compared at a time, token by token."""
EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)
"""No n-gram's hash."""


def mixed(values: np.ndarray) -> np.ndarray:
    """Well-mixed 64-bit numbers of 64-bit numbers, one to one (the finalizer of MurmurHash3, A. Appleby)."""
    values = values ^ (values >> np.uint64(33))
    values *= np.uint64(0xFF51AFD7ED558CCD)
    values ^= values >> np.uint64(33)
    values *= np.uint64(0xC4CEB9FE1A85EC53)
    values ^= values >> np.uint64(33)
    return values


def distinct(numbers: np.ndarray) -> np.ndarray:
    """Each of these numbers once, ascending: `np.unique` by sorting, several times as fast as its table of hashes."""
    ordered = np.sort(numbers)
    new = np.ones(len(ordered), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    return ordered if new.all() else ordered[new]


@cache
def _powers(base: int) -> np.ndarray:
    """1, base, base^2, ... modulo 2^64."""
    powers = np.full(2 * BLOCK, base, np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)


@cache
def _token_values(entries: int) -> np.ndarray:
    return mixed(np.arange(1, entries + 1, dtype=np.uint64) * np.uint64(BASE))


def hashes(ids: np.ndarray, n: int) -> np.ndarray:
    """A 64-bit hash of every n-gram of `ids` (unsigned, [T]): uint64 [max(0, T - n + 1)]; `n` is at most `BLOCK`.

    Polynomials over the tokens' own hashes, each the difference of two prefix sums: the cost does not depend on n.
    """
    count = max(0, len(ids) - n + 1)
    result = np.empty(count, np.uint64)
    values = _token_values(1 << 16 if ids.dtype == np.uint16 else 1 << int(ids.max(initial=1)).bit_length())
    for first in range(0, count, BLOCK):
        last = min(first + BLOCK, count)
        terms = values[ids[first : last + n - 1]] * _powers(BASE)[: last - first + n - 1]
        sums = np.zeros(len(terms) + 1, np.uint64)
        np.cumsum(terms, out=sums[1:])
        block = sums[n:] - sums[:-n]
        block *= _powers(BASE_INVERSE)[: last - first]
        block ^= block >> np.uint64(32)
        block *= np.uint64(0xD6E8FEB86659FD93)
        block ^= block >> np.uint64(32)
        result[first:last] = np.minimum(block, EMPTY - np.uint64(1))
    return result


class Grams:
    """The n-grams of one text."""

    def __init__(self, ids: np.ndarray, n: int) -> None:
        self.ids, self.n = ids, n
        self._hashes = hashes(ids, n)
        self.distinct = distinct(self._hashes)
        """Their hashes, ascending, each once."""

    @cached_property
    def places(self) -> np.ndarray | None:
        """Where one of each distinct hash begins, int64; None where different ones share a hash."""
        order = np.argsort(self._hashes, kind="stable")
        if len(self.distinct) == len(order):
            return order
        ordered = self._hashes[order]
        again = np.append(False, ordered[1:] == ordered[:-1])
        first = order[~again]
        of_same = first[np.cumsum(~again)[again] - 1]
        return first if _same(self, order[again], self, of_same) else None


def jaccard(a: Grams, b: Grams, least: float = 0.0) -> float:
    """Share that the n-grams of both have among the distinct n-grams of either; exact, whatever hashes collide.

    0 where the hashes alone share less than `least`: with collisions in one of the texts the n-grams could share more.
    """
    if np.array_equal(a.ids, b.ids):
        return 1.0
    if min(len(a.distinct), len(b.distinct)) == 0:
        return 0.0
    place = np.searchsorted(b.distinct, a.distinct)
    place[place == len(b.distinct)] = 0
    hit = b.distinct[place] == a.distinct
    shared = int(np.count_nonzero(hit))
    share = shared / (len(a.distinct) + len(b.distinct) - shared)
    if share < least:
        return 0.0
    if a.places is None or b.places is None or not _same(a, a.places[hit], b, b.places[place[hit]]):
        return _jaccard_of_sets(*({row.tobytes() for row in sliding_window_view(each.ids, each.n)} for each in (a, b)))
    return share


def jaccards(texts: Sequence[np.ndarray], pairs: np.ndarray, n: int) -> np.ndarray:
    """`jaccard` of many pairs at once, float64 [P]; `pairs`: int64 [P, 2], places in `texts`, each of n tokens at least."""
    sizes = np.array([len(text) - n + 1 for text in texts])
    ids = np.concatenate(texts)
    text = np.repeat(np.arange(len(texts)), sizes)
    place = np.arange(len(text)) + text * (n - 1)
    low = np.uint64((1 << len(text).bit_length()) - 1)
    keys = np.sort(
        hashes(ids, n)[place] & ~low | np.arange(len(text), dtype=np.uint64)
    )  # sorted, with where they come from
    gram = (keys & low).astype(np.int64)
    again = keys[1:] ^ keys[:-1] <= low
    before, behind = (place[grams[again]] for grams in (gram[:-1], gram[1:]))
    if not all(np.array_equal(ids[before + token], ids[behind + token]) for token in range(n)):
        return np.array([jaccard(Grams(texts[a], n), Grams(texts[b], n)) for a, b in pairs.tolist()])
    number, once = np.empty_like(gram), np.ones(len(gram), bool)
    number[gram] = np.cumsum(np.append(0, ~again))
    once[gram[1:]] = ~again | (text[gram[1:]] != text[gram[:-1]])
    ends = np.cumsum(np.add.reduceat(once, np.cumsum(sizes) - sizes, dtype=np.int64))
    sets = np.split(number[once], ends[:-1])
    seen, shared = np.full(len(gram), -1), np.zeros(len(pairs), np.int64)
    for pair, (a, b) in enumerate(pairs.tolist()):
        seen[sets[a]] = pair
        shared[pair] = np.count_nonzero(seen[sets[b]] == pair)
    counts = np.diff(ends, prepend=0)[pairs].sum(axis=1)
    return shared / (counts - shared)


def _same(a: Grams, places: np.ndarray, b: Grams, others: np.ndarray) -> bool:
    """Are the n-grams that begin in these places the same?"""
    within = np.arange(a.n)
    return all(
        np.array_equal(a.ids[places[part, None] + within], b.ids[others[part, None] + within])
        for part in (slice(first, first + COMPARED) for first in range(0, len(places), COMPARED))
    )


def _jaccard_of_sets(a: set[bytes], b: set[bytes]) -> float:
    return len(a & b) / len(a | b)
