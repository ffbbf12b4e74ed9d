"""Which row is sample k of a run: a pure function of (fingerprint, seed, mixture weights, k), k = 0, 1, 2, ...

Rank, world size, micro-batch and workers do not enter, so a run may change them at any step and continues the same
sequence. Nothing is stored either: both shuffles below are keyed permutations that are computed element by element, so
a data set of 10^12 rows costs the memory of a small one and any k is found in constant time.

1. Samples come in blocks of B. After n blocks, source s has given floor(n B P_s) - floor(n B P_(s-1)) of them, where
   P_s is the sum of the weights up to s: always within one sample of its exact share. A permutation of the block's B
   positions mixes the sources within it.
2. The j-th sample of a source of N rows is element j mod N of its epoch j div N; every epoch is another permutation.
   A source smaller than a step therefore repeats within the step, and says so by its epoch.

Where a stage of a run goes on with the data of earlier ones, its j-th draw of a source is the j-th that they left over:
first what their last, unfinished blocks would still have given, then the draws after them (`Drawn`).

The permutations are Feistel networks on the next power of two with cycle walking (Black and Rogaway 2002, "Ciphers with
arbitrary finite domains"): an image outside the domain is mapped again until it lies inside.
"""

import bisect
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from training.amendments import Amendment, amended, original, passed

WEIGHT_BITS = 20
"""Weights are rounded to multiples of 2^-20, so that all quotas are exact in 64-bit integers."""
BLOCK_BITS = 10
ROUNDS = 4
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Drawn(NamedTuple):
    """Which draws of a source have been made: all before `end` but those in `left`."""

    end: int = 0
    left: np.ndarray = np.empty(0, np.int64)
    """int64 [n], ascending; n is below the length of the blocks that were not finished."""


class SampleOrder:
    """The order of a mixture of sources.

    `weights` are shares relative to each other; without any, a source's share is its number of rows. A weight of 0
    leaves the source out. `sources` lists the others, in the order that `locate_many` numbers them. `drawn` (by source)
    is what earlier orders of the same data and seed took, which this one does not take again before its epoch is over.
    `amendments`, the oldest first, are what was decided about this order since.
    """

    def __init__(
        self,
        rows_per_source: Mapping[str, int],
        weights: Mapping[str, float | None],
        fingerprint: str,
        seed: int,
        drawn: Mapping[str, Drawn] | None = None,
        amendments: Sequence[Amendment] = (),
    ) -> None:
        shares = _shares(rows_per_source, weights)
        self.sources = sorted(shares)
        self.rows = [rows_per_source[name] for name in self.sources]
        self._drawn: dict[str, Drawn] = dict(drawn or {})
        self.amendments = list(amendments)
        identity = {
            "version": 1,
            "fingerprint": fingerprint,
            "seed": seed,
            "sources": [[name, rows_per_source[name], shares[name]] for name in self.sources],
        }
        if drawn:
            left = {name: hashlib.sha256(taken.left.tobytes()).hexdigest() for name, taken in drawn.items()}
            identity["drawn"] = [[name, drawn[name].end, left[name]] for name in sorted(drawn)]
        if amendments:
            identity["amendments"] = [amendment.identity for amendment in amendments]
        self.digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        """Equal digests, equal orders: what a checkpoint must remember beside the samples consumed."""
        self._ends = np.cumsum([0] + [shares[name] for name in self.sources])  # P_s * 2^WEIGHT_BITS
        rarest = min(shares.values())
        self._block_bits = max(BLOCK_BITS, WEIGHT_BITS - rarest.bit_length() + 1)
        self._block_key = _key(fingerprint, seed, "block")
        self._keys = [_key(fingerprint, seed, f"source:{name}") for name in self.sources]

    def locate(self, k: int) -> tuple[str, int, int]:
        """Source, row in it and epoch of sample `k`."""
        source, row, epoch = (int(a[0]) for a in self.locate_many(np.array([k])))
        return self.sources[source], row, epoch

    def locate_many(self, ks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Index into `sources`, row and epoch, int64 [n] each, of the samples `ks` (int64 [n], any order)."""
        ks = original(np.asarray(ks, np.int64), self.amendments)
        source, draw = self._draw(ks)
        row, epoch = np.empty_like(ks), np.empty_like(ks)
        for s in range(len(self.sources)):
            chosen = slice(None) if len(self.sources) == 1 else np.flatnonzero(source == s)
            epoch[chosen], place = np.divmod(self._continued(s, draw[chosen]), self.rows[s])
            row[chosen] = permute(place, self.rows[s], _mix(self._keys[s] + epoch[chosen].astype(np.uint64) * _GOLDEN))
        return source, row, epoch

    def find(self, source: str, row: int, epoch: int) -> int | None:
        """The reverse of `locate`: which sample it is; None where it is left out or an earlier order has taken it."""
        s, key = self.sources.index(source), np.array([epoch], np.uint64)
        place = permute(np.array([row]), self.rows[s], _mix(self._keys[s] + key * _GOLDEN), inverse=True)
        draw = epoch * self.rows[s] + int(place[0])
        if source in self._drawn:
            end, left = self._drawn[source]
            again = np.flatnonzero(left == draw)
            if draw < end and not len(again):
                return None
            draw = int(again[0]) if draw < end else draw - end + len(left)
        number = int(amended(np.array([self._sample(s, draw)]), self.amendments)[0])
        return None if number < 0 else number

    def _sample(self, s: int, draw: int) -> int:
        """Which sample of the order without amendments is a source's draw of this number."""
        if len(self.sources) == 1:
            return draw
        bits, (begin, end) = self._block_bits, (int(bound) for bound in self._ends[s : s + 2])

        def given(blocks: int) -> int:
            return (blocks * end >> WEIGHT_BITS - bits) - (blocks * begin >> WEIGHT_BITS - bits)

        block = bisect.bisect_right(range(draw * (1 << WEIGHT_BITS) // (end - begin) + 2), draw, key=given) - 1
        before, slots = self._given(block), self._given(block + 1) - self._given(block)
        place = np.array([draw - (before[s + 1] - before[s]) + slots[s]])
        key = _mix(self._block_key + np.array([block], np.uint64) * _GOLDEN)
        return block << bits | int(permute(place, 1 << bits, key, inverse=True)[0])

    def last_epochs(self, samples: int) -> dict[str, int]:
        """Of each source, the epoch that the first `samples` samples reach, or at most that."""
        taken = self.drawn_after(samples)
        return {name: taken[name].end // rows for name, rows in zip(self.sources, self.rows, strict=True)}

    def drawn_after(self, samples: int) -> dict[str, Drawn]:
        """What has been drawn of every source when the first `samples` samples of this order have been used."""
        samples = passed(samples, self.amendments)
        bits = self._block_bits if len(self.sources) > 1 else 0
        blocks = -(-samples >> bits)  # begun
        unused, draw = self._draw(np.arange(samples, blocks << bits))
        given = np.diff(self._given(blocks)) if len(self.sources) > 1 else [samples]
        result = dict(self._drawn)
        for s, (name, count) in enumerate(zip(self.sources, given, strict=True)):
            before = self._drawn.get(name, Drawn())
            still = self._continued(s, np.sort(draw[unused == s]))
            result[name] = Drawn(
                before.end + max(0, int(count) - len(before.left)), np.concatenate([still, before.left[count:]])
            )
        return result

    def _continued(self, s: int, draw: np.ndarray) -> np.ndarray:
        """The draws of a source (int64 [n], as if nothing had been drawn) after what earlier orders took."""
        if self.sources[s] not in self._drawn:
            return draw
        end, left = self._drawn[self.sources[s]]
        result = end - len(left) + draw
        again = draw < len(left)
        result[again] = left[draw[again]]
        return result

    def _given(self, blocks: np.ndarray | int) -> np.ndarray:
        """Samples that sources 0 .. s - 1 have given after so many blocks: int64 [..., sources + 1]."""
        return np.asarray(blocks, np.int64)[..., None] * self._ends >> WEIGHT_BITS - self._block_bits

    def _draw(self, ks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each sample, and how many samples that source has given before it."""
        if len(self.sources) == 1:
            return np.zeros_like(ks), ks
        bits = self._block_bits
        block = ks >> bits
        key = _mix(self._block_key + block.astype(np.uint64) * _GOLDEN)
        place = permute(ks & ((1 << bits) - 1), 1 << bits, key)
        before = self._given(block)  # [n, sources + 1]
        slots = self._given(block + 1) - before  # in this block source s owns the places slots[s] .. slots[s + 1] - 1
        source = (place[:, None] >= slots[:, 1:]).sum(1)
        item = np.arange(len(ks))
        return source, before[item, source + 1] - before[item, source] + place - slots[item, source]


def permute(index: np.ndarray, size: int, key: np.ndarray, inverse: bool = False) -> np.ndarray:
    """Images of `index` (int64 [n]) under the permutations of [0, size) that `key` (uint64 [n]) selects, or under their
    inverses."""
    bits, network = max(2, (size - 1).bit_length()), _inverse_feistel if inverse else _feistel
    image = network(index.astype(np.uint64), bits, key)
    outside = np.flatnonzero(image >= size)
    while len(outside):
        image[outside] = network(image[outside], bits, key[outside])
        outside = outside[image[outside] >= size]
    return image.astype(np.int64)


def _feistel(x: np.ndarray, bits: int, key: np.ndarray) -> np.ndarray:
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)
    low, high = x & low_mask, x >> low_bits
    for _ in range(ROUNDS):
        key = key + _GOLDEN
        high ^= _mix(low ^ key) & high_mask
        key = key + _GOLDEN
        low ^= _mix(high ^ key) & low_mask
    return high << low_bits | low


def _inverse_feistel(x: np.ndarray, bits: int, key: np.ndarray) -> np.ndarray:
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64((1 << bits // 2) - 1), np.uint64((1 << bits - bits // 2) - 1)
    low, high = x & low_mask, x >> low_bits
    key = key + np.array([2 * ROUNDS], np.uint64) * _GOLDEN
    for _ in range(ROUNDS):
        low ^= _mix(high ^ key) & low_mask
        key = key - _GOLDEN
        high ^= _mix(low ^ key) & high_mask
        key = key - _GOLDEN
    return high << low_bits | low


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every input bit reaches every output bit."""
    x = (x ^ x >> np.uint64(30)) * _MULTIPLIERS[0]
    x = (x ^ x >> np.uint64(27)) * _MULTIPLIERS[1]
    return x ^ x >> np.uint64(31)


def _key(fingerprint: str, seed: int, purpose: str) -> np.ndarray:
    digest = hashlib.sha256(f"{fingerprint}\0{seed}\0{purpose}".encode()).digest()
    return np.frombuffer(digest[:8], np.uint64)  # [1], so that arithmetic on it wraps silently


def _shares(rows_per_source: Mapping[str, int], weights: Mapping[str, float | None]) -> dict[str, int]:
    """Positive integers in proportion to the weights, adding up to 2^WEIGHT_BITS."""
    if unknown := sorted(set(weights) - set(rows_per_source)):
        raise ValueError(f"weight for unknown source {unknown[0]!r}: the data has {', '.join(sorted(rows_per_source))}")
    given = {name: weights.get(name) for name in sorted(rows_per_source)}
    if len({value is None for value in given.values()}) > 1:
        without = next(name for name, value in given.items() if value is None)
        raise ValueError(
            f"source {without!r} has no weight while others have: give a weight to every source or to none"
        )
    share: dict[str, float] = {name: rows_per_source[name] if value is None else value for name, value in given.items()}
    total = sum(share.values())
    if not math.isfinite(total) or min(share.values(), default=0) < 0 or not total:
        raise ValueError(f"weights must be finite, must not be negative and at least one must be positive: {share}")
    share = {name: value / total for name, value in share.items() if value}
    if empty := [name for name in share if not rows_per_source[name]]:
        raise ValueError(f"source {empty[0]!r} has a weight but no rows")
    exact = {name: value * (1 << WEIGHT_BITS) for name, value in share.items()}
    result = {name: max(1, int(value)) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (result[name] - exact[name], name))
    for i in range((1 << WEIGHT_BITS) - sum(result.values())):
        result[by_remainder[i % len(result)]] += 1
    if (surplus := sum(result.values()) - (1 << WEIGHT_BITS)) > 0:
        result[max(result, key=lambda name: result[name])] -= surplus
    return result
