"""Pairs of sketched items that are equal in at least one band, in order, from files: memory does not grow with the corpus.

Items are numbered through all units. In a band, those with equal hashes are found a part of the hashes at a time; each
is paired with the first FIRST of them and with the one before it. Pairs are sorted in runs on disk and merged.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.duplicates.ngrams import distinct
from data_prep.duplicates.sketch import SLOTS
from storage.atomic import publish

FIRST = 8
ITEMS_AT_ONCE, PAIRS_AT_ONCE = 1 << 24, 1 << 24
"""About 1 GB, and 128 MB a run."""
MOST_ITEMS = 1 << 32


class Items:
    """The sketched items of all units, by their numbers: documents or sections."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self._tables = [_open(path) for path in paths]
        self.starts = np.cumsum([0, *(table.num_rows for table in self._tables)], dtype=np.int64)
        self.bands = sum(name.startswith("band") for name in self._tables[0].column_names)
        if len(self) >= MOST_ITEMS:
            raise ValueError(
                f"{len(self):,} sections are more than {MOST_ITEMS:,}: choose a larger --section-tokens, or "
                "look for near-duplicates in parts of the corpus"
            )

    def __len__(self) -> int:
        return int(self.starts[-1])

    def column(self, name: str, unit: int) -> np.ndarray:
        """int64 or uint64 [items of the unit]"""
        return self._tables[unit][name].to_numpy()

    def gathered(self, name: str, numbers: np.ndarray) -> np.ndarray:
        """A column's values for these items [items]; of `slots` uint8 [items, SLOTS]."""
        units = np.searchsorted(self.starts, numbers, side="right") - 1
        shape = (len(numbers), SLOTS) if name == "slots" else len(numbers)
        result = np.empty(shape, np.uint8 if name == "slots" else np.int64)
        for unit in np.unique(units).tolist():
            mine = np.flatnonzero(units == unit)
            if name == "slots":
                column = np.frombuffer(self._tables[unit][name].chunk(0).buffers()[1], np.uint8).reshape(-1, SLOTS)
            else:
                column = self.column(name, unit)
            result[mine] = column[numbers[mine] - self.starts[unit]]
        return result

    def pairs(self, folder: Path) -> Iterator[np.ndarray]:
        """All candidates as (later << 32 | earlier), uint64, ascending, in pieces; runs lie in `folder` meanwhile."""
        runs = SortedRuns(folder)
        parts = -(-len(self) // ITEMS_AT_ONCE)
        for band in range(self.bands):
            for part in range(parts):
                for found in _paired(*self._part(f"band{band:02d}", part, parts)):
                    runs.add(found)
        return runs.merged()

    def _part(self, band: str, part: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
        """Hashes of a band that are in a part of all hashes, and the items' numbers."""
        hashes, items = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
        for unit, start in enumerate(self.starts[:-1].tolist()):
            column = self.column(band, unit)
            mine = np.flatnonzero(((column >> np.uint64(32)) * np.uint64(parts)) >> np.uint64(32) == part)
            hashes.append(column[mine])
            items.append((start + mine).astype(np.uint64))
        return np.concatenate(hashes), np.concatenate(items)


def _open(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        return stream.read_all()


def _paired(hashes: np.ndarray, items: np.ndarray) -> Iterator[np.ndarray]:
    order = np.argsort(hashes)
    ordered = hashes[order]
    same = np.append(ordered[1:] == ordered[:-1], False)
    grouped = same.copy()
    grouped[1:] |= same[:-1]
    items, same = items[order[grouped]], same[grouped]
    if not len(items):
        return
    group = np.cumsum(np.append(True, ~same[:-1])).astype(np.uint64)
    items = np.sort(group << np.uint64(32) | items) & np.uint64(0xFFFFFFFF)
    begins = np.flatnonzero(np.append(True, ~same[:-1]))
    place = np.arange(len(items))
    begin = np.repeat(begins, np.diff(np.append(begins, len(items))))
    for earlier in (*(begin + first for first in range(FIRST)), place - 1):
        later = np.flatnonzero((earlier < place) & (earlier >= begin))
        yield items[later] << np.uint64(32) | items[earlier[later]]


class SortedRuns:
    """Numbers, sorted without repetition by way of files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[np.ndarray] = []
        self.held: list[np.ndarray] = []

    def add(self, numbers: np.ndarray) -> None:
        self.held.append(numbers)
        if sum(map(len, self.held)) >= PAIRS_AT_ONCE:
            self.held = [distinct(np.concatenate(self.held))]
            if len(self.held[0]) >= PAIRS_AT_ONCE // 2:
                self._spill(self.held.pop())

    def _spill(self, numbers: np.ndarray) -> None:
        path = self.folder / f"run-{len(self.files):04d}.npy"
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            np.save(file, numbers)
        publish(temporary, path)
        self.files.append(np.load(path, mmap_mode="r"))

    def merged(self) -> Iterator[np.ndarray]:
        """All numbers, ascending, each once."""
        runs = [*self.files, distinct(np.concatenate([np.zeros(0, np.uint64), *self.held]))]
        at = [0] * len(runs)
        step = max(1, PAIRS_AT_ONCE // len(runs))
        while any(place < len(run) for place, run in zip(at, runs, strict=True)):
            limit = min(
                run[min(place + step, len(run)) - 1] for place, run in zip(at, runs, strict=True) if place < len(run)
            )
            ends = [int(np.searchsorted(run, limit, side="right")) for run in runs]
            yield distinct(np.concatenate([run[place:end] for place, end, run in zip(at, ends, runs, strict=True)]))
            at = ends
