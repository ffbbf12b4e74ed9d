"""The plan of a build: everything that decides its output, fixed before the work begins and kept in the output folder.

The same command run again finds its own plan and continues; a command that would give another result is refused.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from data_prep.sources import InputFile, Source, Unit, plan_units
from data_prep.tokenizer import Tokenizer
from training.manifest import MANIFEST_FILE, PackingPolicy, write_atomically

PLAN_FILE, LOCK_FILE, TOKENIZER_FOLDER, TOKENS_FOLDER = "plan.json", ".lock", "tokenizer", "tokens"
PLAN_VERSION = 1


class BuildOptions(BaseModel):
    """The options that decide the result (how it is computed: see `data_prep.build --help`)."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    packing: PackingPolicy
    text_field: str = "text"
    """field or column that holds the text"""
    id_field: str | None = None
    """field or column that names a document (default: its place in the input)"""
    validation_fraction: float = Field(default=0.01, ge=0, lt=1)
    """share of the documents for validation, chosen by the hash of their key; 0 for no validation split"""
    deduplicate: bool = False
    """leave out documents whose text is exactly that of an earlier one"""
    seed: int = Field(default=0, ge=0)
    """decides the split and the order of the rows"""
    unit_bytes: int | None = Field(default=None, ge=1)
    """bytes of input a worker does at a time (default: by the size of the input, at most 64 MiB)"""


class Plan:
    def __init__(self, sources: list[Source], options: BuildOptions, tokenizer: Tokenizer):
        self.options, self.sources = options, sources
        self.units, self.files = plan_units(sources, options.unit_bytes)
        self.source_files = {source.name: self._files_of(source.name) for source in sources}
        self.content: dict[str, Any] = {
            "version": PLAN_VERSION,
            "tokenizer": tokenizer.info(TOKENIZER_FOLDER).model_dump(),
            **options.model_dump(),
            "sources": {
                source.name: {
                    "weight": source.weight,
                    "files": [[file.name, file.format, file.size] for file in self.source_files[source.name]],
                }
                for source in sources
            },
        }
        self.sha256 = hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()

    def _files_of(self, source: str) -> list[InputFile]:
        ranges = [(unit.first_file, unit.last_file) for unit in self.units if unit.source == source]
        return self.files[min(first for first, _ in ranges) : max(last for _, last in ranges)]

    def unit_sources(self) -> list[int]:
        numbers = {source.name: number for number, source in enumerate(self.sources)}
        return [numbers[unit.source] for unit in self.units]

    def adopt(self, output: Path) -> None:
        """Take possession of an output folder: store the plan, or compare it with the one there.

        Units whose input was modified since, without its size changing, lose their ledger and are done again.
        """
        times = {file.path: file.mtime_ns for file in self.files}
        try:
            stored = json.loads((output / PLAN_FILE).read_bytes())
            before, there = stored["times"], stored["plan"]
        except FileNotFoundError:
            strangers = sorted(
                path.name for path in output.iterdir() if not path.name.startswith((LOCK_FILE, PLAN_FILE))
            )
            if strangers:
                raise ValueError(
                    f"{output} is not empty and no build of this program ({strangers[0]}): choose another --output"
                ) from None
            before, there = times, None
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{output / PLAN_FILE} is damaged: choose another --output") from None
        if there is not None and (differences := list(_differences(there, json.loads(json.dumps(self.content))))):
            raise ValueError(
                f"{output} was begun with another plan ({'; '.join(differences)}): "
                "repeat that command to continue it, or choose another --output"
            )
        changed = {path for path, time in times.items() if before.get(path, time) != time}
        if changed and (output / MANIFEST_FILE).exists():
            raise ValueError(
                f"{min(changed)} was modified after {output} had been built from it: choose another --output"
            )
        if there is None or times != before:
            for unit in self._units_of(changed):
                (output / TOKENS_FOLDER / f"unit-{unit:05d}.json").unlink(missing_ok=True)
            write_atomically(output / PLAN_FILE, json.dumps({"plan": self.content, "times": times}).encode())

    def _units_of(self, paths: set[str]) -> set[int]:
        return {
            unit.index
            for unit in self.units
            if any(file.path in paths for file in self.files[unit.first_file : unit.last_file])
        }

    def input_hashes(self, unit_hashes: list[str]) -> dict[str, str]:
        """Per source, the hash of its files' contents (`unit_hashes`: of each unit's part of them)."""
        digests = {source.name: hashlib.sha256() for source in self.sources}
        for unit, unit_hash in zip(self.units, unit_hashes, strict=True):
            digests[unit.source].update(unit_hash.encode())
        return {name: digest.hexdigest() for name, digest in digests.items()}


def _differences(there: dict, here: dict, place: str = "") -> Iterator[str]:
    """Sentences such as "seed is 0 there and 1 here" for every key that differs."""
    for key in sorted({*there, *here}):
        old, new = there.get(key), here.get(key)
        if old == new:
            continue
        name = f"{place}{key}"
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{name}.")
        elif isinstance(old, list) and isinstance(new, list):
            first = next((pair for pair in zip(old, new, strict=False) if pair[0] != pair[1]), None)
            example = f", the first is {first[1][0]}" if first else f": {len(old)} there and {len(new)} here"
            yield f"{name} differ{example}"
        else:
            short = [f"{str(value)[:40]}" for value in (old, new)]
            yield f"{name} is {short[0]} there and {short[1]} here"


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the output folder's lock; it goes when the process does, however that ends."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"--output {output} is not a folder") from None
    with (output / LOCK_FILE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"another build is writing to {output}: wait for it or choose another --output") from None
        yield


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of a build that was killed."""
    for path in folder.glob("*.tmp"):
        path.unlink(missing_ok=True)


def unfinished(units: list[Unit], done: dict[int, Any]) -> list[Unit]:
    """Units still to do, the largest first so that the last ones to finish are small."""
    return sorted((unit for unit in units if unit.index not in done), key=lambda unit: -unit.size)


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
