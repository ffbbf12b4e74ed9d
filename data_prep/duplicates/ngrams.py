"""n-grams of tokens: a hash of each, and how much two texts share of theirs."""

from functools import cache

import numpy as np

BLOCK = 1 << 18
"""n-grams hashed at a time: what they need stays in a core's cache."""
BASE, BASE_INVERSE = 0x9E3779B97F4A7C15, pow(0x9E3779B97F4A7C15, -1, 1 << 64)
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
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)])
        block = (sums[n:] - sums[:-n]) * _powers(BASE_INVERSE)[: last - first]
        block ^= block >> np.uint64(32)
        block *= np.uint64(0xD6E8FEB86659FD93)
        block ^= block >> np.uint64(32)
        result[first:last] = np.minimum(block, EMPTY - np.uint64(1))
    return result


def likeness(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard similarity of two sets of hashes, each ascending without repetition: less than that of the n-grams at most
    where two n-grams of one text share a hash."""
    if min(len(a), len(b)) == 0:
        return 0.0
    both = np.concatenate([a, b])
    both.sort()
    shared = int(np.count_nonzero(both[1:] == both[:-1]))
    return shared / (len(both) - shared)


def jaccard(a: np.ndarray, b: np.ndarray, n: int) -> float:
    """Share that the n-grams of both have among the distinct n-grams of either; exact, whatever hashes collide."""
    if np.array_equal(a, b):
        return 1.0
    if min(len(a), len(b)) < n:
        return 0.0
    keys = np.concatenate([hashes(a, n), hashes(b, n)])
    order = np.argsort(keys, kind="stable")
    same = keys[order[1:]] == keys[order[:-1]]
    view = np.lib.stride_tricks.sliding_window_view
    grams = view(a, n), view(b, n)
    if not _equal(grams, order[1:][same], order[:-1][same]):
        return _jaccard_of_sets(*({row.tobytes() for row in side} for side in grams))
    of_b = order >= len(grams[0])
    union = 1 + np.count_nonzero(~same)
    of_each = 1 + np.count_nonzero(~same | (of_b[1:] != of_b[:-1]))
    return float(of_each - union) / union


def _equal(grams: tuple[np.ndarray, np.ndarray], left: np.ndarray, right: np.ndarray) -> bool:
    """Are the n-grams of these places, counted through both texts, the same?"""

    def column(places: np.ndarray, j: int) -> np.ndarray:
        return np.concatenate([side[:, j] for side in grams])[places]

    return all(np.array_equal(column(left, j), column(right, j)) for j in range(grams[0].shape[1]))


def _jaccard_of_sets(a: set[bytes], b: set[bytes]) -> float:
    return len(a & b) / len(a | b)
