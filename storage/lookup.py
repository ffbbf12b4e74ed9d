"""Values by their key among 10^9 pairs, without reading them: an index on disk, searched through a memory map.

    column  type
    key     uint64
    value   int64

An Arrow stream of runs of `RUN` pairs, each sorted by key, the values of a key in the order in which they were given; an
empty run ends it, since a stream that is cut between two messages would read as fewer. Making it needs the memory of one run.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from storage.atomic import new_stream

RUN = 1 << 24
"""Pairs of a run: 256 MiB."""
COLUMNS = {"key": pa.uint64(), "value": pa.int64()}

Pairs = tuple[np.ndarray, np.ndarray]
"""Keys and values, uint64 [n] and int64 [n]."""


def sorted_runs(pairs: Iterable[Pairs]) -> Iterator[Pairs]:
    """The pairs, given in pieces of any length, in sorted runs of `RUN`; the last may be shorter."""
    waiting: list[Pairs] = []

    def joined() -> Pairs:
        keys, values = (np.concatenate(column) for column in zip(*waiting, strict=True))
        return keys.astype(np.uint64, copy=False), values.astype(np.int64, copy=False)

    def ordered(keys: np.ndarray, values: np.ndarray) -> Pairs:
        order = np.argsort(keys, kind="stable")
        return keys[order], values[order]

    for piece in pairs:
        waiting.append(piece)
        while sum(len(keys) for keys, _ in waiting) >= RUN:
            keys, values = joined()
            yield ordered(keys[:RUN], values[:RUN])
            waiting = [(keys[RUN:], values[RUN:])]
    if sum(len(keys) for keys, _ in waiting):
        yield ordered(*joined())


def write_lookup(path: Path, made_from: str, pairs: Iterable[Pairs]) -> None:
    """Whole or not at all. `made_from`: what `Lookup.open` must be told to believe it."""
    schema = pa.schema(COLUMNS, {"made_from": made_from})
    with new_stream(path, schema) as stream:
        for run in (*sorted_runs(pairs), (np.empty(0, np.uint64), np.empty(0, np.int64))):
            stream.write_batch(pa.record_batch([pa.array(column) for column in run], schema=schema))


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
