"""What decisions change in the order of a stage's samples: some are left out, or a stretch is taken in another order.

Each amendment renumbers what it found. Numbers are those of the samples after all amendments; `original` leads them back to the
numbers of the stage's order, `amended` forth.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import xxhash


class Amendment(Protocol):
    def before(self, numbers: np.ndarray) -> np.ndarray:
        """What the samples with these numbers (int64 [n]) were called before this amendment."""
        ...

    def after(self, numbers: np.ndarray) -> np.ndarray:
        """The reverse; -1 for those that are left out."""
        ...

    def passed(self, count: int) -> int:
        """How many samples of before have been dealt with when the first `count` have been used."""
        ...

    @property
    def identity(self) -> list[Any]: ...


class LeaveOut:
    """Samples that are not trained on; those after them move up."""

    def __init__(self, samples: Sequence[int]) -> None:
        self._samples = np.array(sorted(set(samples)), np.int64)
        self._later = self._samples - np.arange(len(self._samples))

    def before(self, numbers: np.ndarray) -> np.ndarray:
        return numbers + np.searchsorted(self._later, numbers, side="right")

    def after(self, numbers: np.ndarray) -> np.ndarray:
        return np.where(np.isin(numbers, self._samples), -1, numbers - np.searchsorted(self._samples, numbers))

    def passed(self, count: int) -> int:
        return int(self.before(np.array([count - 1]))[0]) + 1 if count else 0

    @property
    def identity(self) -> list[Any]:
        return ["leave out", *self._samples.tolist()]


class Reorder:
    """The samples first .. end - 1 in another order, which `key` decides."""

    def __init__(self, first: int, end: int, key: int) -> None:
        self._first, self._end, self._key = first, end, key
        hashes = [xxhash.xxh3_64_intdigest(f"reorder\0{key}\0{number}".encode()) for number in range(first, end)]
        self._order = first + np.argsort(np.array(hashes, np.uint64), kind="stable")
        self._place = first + np.argsort(self._order, kind="stable")

    def before(self, numbers: np.ndarray) -> np.ndarray:
        return self._look_up(self._order, numbers)

    def after(self, numbers: np.ndarray) -> np.ndarray:
        return self._look_up(self._place, numbers)

    def _look_up(self, table: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        inside = (self._first <= numbers) & (numbers < self._end)
        result = numbers.copy()
        result[inside] = table[numbers[inside] - self._first]
        return result

    def passed(self, count: int) -> int:
        assert not self._first < count < self._end, "a stage does not end within a stretch that was taken again"
        return count

    @property
    def identity(self) -> list[Any]:
        return ["reorder", self._first, self._end, self._key]


def original(numbers: np.ndarray, amendments: Sequence[Amendment]) -> np.ndarray:
    """Numbers (int64 [n]) in the stage's order of the samples that are called so after the amendments, oldest first."""
    for amendment in reversed(amendments):
        numbers = amendment.before(numbers)
    return numbers


def amended(numbers: np.ndarray, amendments: Sequence[Amendment]) -> np.ndarray:
    """The reverse of `original`; -1 for what is left out."""
    for amendment in amendments:
        numbers = np.where(numbers < 0, -1, amendment.after(np.maximum(numbers, 0)))
    return numbers


def passed(count: int, amendments: Sequence[Amendment]) -> int:
    """How many samples of the stage's order have been dealt with when the first `count` have been used."""
    for amendment in reversed(amendments):
        count = amendment.passed(count)
    return count
