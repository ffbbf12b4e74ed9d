"""Values by their key among 10^9 pairs, without reading them: an index on disk, searched through a memory map.

    column  type
    key     uint64
    value   int64

An Arrow stream of runs of `RUN` pairs, each sorted by key, the values of a key in the order in which they were given; an
empty run ends it, since a stream that is cut between two messages would read as fewer. Making it needs the memory of one run.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa

from storage.atomic import new_stream

RUN = 1 << 24
"""Pairs of a run: 256 MiB."""
LOOKED_AT = 1 << 21
COLUMNS = {"key": pa.uint64(), "value": pa.int64()}

Pairs = tuple[np.ndarray, np.ndarray]
"""Keys and values, uint64 [n] and int64 [n]."""


def sorted_runs(pairs: Iterable[Pairs]) -> Iterator[Pairs]:
    """The pairs, given in pieces of any length, in sorted runs of `RUN`; the last may be shorter."""
    keys, values, held = np.empty(RUN, np.uint64), np.empty(RUN, np.int64), 0

    def ordered() -> Pairs:
        order = np.argsort(keys[:held], kind="stable")
        for column in (keys, values):  # in their place: a copy of one at a time
            column[:held] = column[order]
        return keys[:held], values[:held]

    for some_keys, some_values in pairs:
        taken = 0
        while taken < len(some_keys):
            count = min(RUN - held, len(some_keys) - taken)
            keys[held : held + count] = some_keys[taken : taken + count]
            values[held : held + count] = some_values[taken : taken + count]
            held, taken = held + count, taken + count
            if held == RUN:
                yield ordered()
                keys, values, held = np.empty(RUN, np.uint64), np.empty(RUN, np.int64), 0
    if held:
        yield ordered()


def write_lookup(path: Path, made_from: str, pairs: Iterable[Pairs]) -> None:
    """Whole or not at all. `made_from`: what `Lookup.open` must be told to believe it."""
    schema = pa.schema(COLUMNS, {"made_from": made_from})
    with new_stream(path, schema) as stream:
        for run in chain(sorted_runs(pairs), [(np.empty(0, np.uint64), np.empty(0, np.int64))]):
            stream.write_batch(pa.record_batch([pa.array(column) for column in run], schema=schema))
            del run  # before the next is made


class Lookup:
    """An index that `write_lookup` made."""

    def __init__(self, runs: list[Pairs]) -> None:
        self.runs = runs

    @classmethod
    def open(cls, path: Path, made_from: str) -> "Lookup | None":
        """None where there is none, or one that is damaged or was made from something else."""
        try:
            with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
                metadata, batches = stream.schema.metadata, list(stream)
        except (OSError, pa.ArrowException):
            return None
        if metadata != {b"made_from": made_from.encode()} or not batches or batches.pop().num_rows:
            return None
        return cls([(batch["key"].to_numpy(), batch["value"].to_numpy()) for batch in batches])

    def find(self, key: int) -> list[int]:
        """The values of a key, run by run."""
        wanted, found = np.uint64(key), list[int]()
        for keys, values in self.runs:
            if keys[0] <= wanted <= keys[-1]:
                begin, end = (np.searchsorted(keys, wanted, side) for side in ("left", "right"))
                found += values[begin:end].tolist()
        return found

    def distinct(self) -> int:
        """How many different keys there are, where they are hashes: some of them are looked at together."""
        parts = 1 + sum(len(keys) for keys, _ in self.runs) // LOOKED_AT
        count, begins = 0, [0] * len(self.runs)
        for part in range(1, parts + 1):
            found, last = np.empty(0, np.uint64), np.uint64(part * 2**64 // parts - 1)
            for number, (keys, _) in enumerate(self.runs):
                end = int(np.searchsorted(keys, last, side="right"))
                for first in range(begins[number], end, LOOKED_AT):
                    found = np.concatenate([found, keys[first : min(first + LOOKED_AT, end)]])
                    if len(found) > 2 * LOOKED_AT:
                        found = _distinct(found)
                begins[number] = end
            count += len(_distinct(found))
        return count


def _distinct(keys: np.ndarray) -> np.ndarray:
    ordered = np.sort(keys)
    return ordered[np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]]
