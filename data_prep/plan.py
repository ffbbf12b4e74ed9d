"""The plan of a build: everything that decides its output, fixed before the work begins and kept in the output folder.

The same command run again finds its own plan and continues; a command that would give another result is refused.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from console.progress import say
from data_prep.find import Source
from data_prep.ledger import finished_units, has_documents, take_over_units
from data_prep.options import BuildOptions
from data_prep.records import InputFile, Unit, printable
from data_prep.sources import plan_units
from data_prep.tokenizer import Tokenizer
from storage.atomic import write_atomically
from storage.locks import lock
from storage.manifest import MANIFEST_FILE

PLAN_FILE, LOCK_FILE, TOKENIZER_FOLDER, TOKENS_FOLDER = "plan.json", ".lock", "tokenizer", "tokens"
PLAN_VERSION = 1
WAIT = "wait for it or choose another --output"


class StoredPlan(NamedTuple):
    """What an output folder keeps of the plan that it was begun with."""

    plan: dict[str, Any]
    times: dict[str, int]
    """Of the input files, by path."""
    units: tuple[str, ...] = ()
    """A hash of what each unit covers."""
    failed: bool = False
    """The last run ended at input that could not be read."""


class PackingPlan:
    """All that decides a data set, without the input that its token store is made from."""

    unit_hashes: tuple[str, ...] = ()

    def __init__(
        self, options: BuildOptions, sources: list[Source], content: dict[str, Any], times: dict[str, int]
    ) -> None:
        self.options, self.sources, self.content, self.times = options, sources, content, times
        self.sha256 = plan_hash(content)

    def adopt(self, output: Path) -> None:
        """Take possession of an output folder: store the plan, or compare it with the one there.

        Units whose input was modified since, without its size changing, lose their ledger and are done again. An unfinished
        data set takes another plan where nothing is lost by it (see `_kept_units`).
        """
        try:
            stored = read_plan(output)
        except FileNotFoundError:
            strangers = sorted(
                path.name for path in output.iterdir() if not path.name.startswith((LOCK_FILE, PLAN_FILE))
            )
            if strangers:
                raise ValueError(
                    f"{output} is not empty and no build of this program ({strangers[0]}): choose another --output"
                ) from None
            stored = None
        here = json.loads(json.dumps(self.content))
        if stored is not None and (differences := list(_differences(stored.plan, here))):
            done, kept = finished_units(output / TOKENS_FOLDER), self._kept_units(output, stored, here)
            if kept is None:
                raise ValueError(
                    f"{output} was begun with another plan ({'; '.join(differences)}): "
                    "repeat that command to continue it, or choose another --output"
                )
            stay = f": {len(done & kept):,} of its {len(done):,} finished units are kept" if done else ""
            say(f"{output}, begun with another plan ({'; '.join(differences)}), takes this one{stay}")
            take_over_units(output / TOKENS_FOLDER, plan_hash(stored.plan), self.sha256, kept)
            shutil.rmtree(output / TOKENIZER_FOLDER, ignore_errors=True)
        before = self.times if stored is None else stored.times
        changed = {path for path, time in self.times.items() if before.get(path, time) != time}
        if changed and (output / MANIFEST_FILE).exists():
            raise ValueError(
                f"{min(changed)} was modified after {output} had been built from it: choose another --output"
            )
        for unit in self._units_of(changed):
            (output / TOKENS_FOLDER / f"unit-{unit:05d}.json").unlink(missing_ok=True)
        if stored != (mine := StoredPlan(here, self.times, self.unit_hashes)):
            write_plan(output, mine)

    def refuse_another(self, output: Path) -> None:
        """Raise ValueError unless the plan in an output folder, which others are carrying out, is this one."""
        stored = read_plan(output)
        if differences := list(_differences(stored.plan, json.loads(json.dumps(self.content)))):
            raise ValueError(f"parts of another plan ({'; '.join(differences)}) are writing to {output}: {WAIT}")
        changed = {path for path, time in self.times.items() if stored.times.get(path) != time}
        if changed:
            raise ValueError(
                f"{min(changed)} has another modification time here than where the parts that are writing to {output} began: "
                "all parts need the same files, so wait for them, or read the input from one file system"
            )

    def note_failure(self, output: Path) -> None:
        """Remember that this plan cannot be carried out with its input as it is."""
        write_plan(output, StoredPlan(self.content, self.times, self.unit_hashes, failed=True))

    def _kept_units(self, output: Path, stored: StoredPlan, here: dict[str, Any]) -> set[int] | None:
        """The units of another plan that can stay; None: its data set is finished, or work would be lost by mistake.

        All stay where only packing or split are another. Where input files have another size, or there are more of them, those of
        the others stay. Where a run failed at its input, the fields to be read may be chosen anew.
        """
        if (output / MANIFEST_FILE).exists():
            return None
        keys = {key for key in {*stored.plan, *here} if stored.plan.get(key) != here.get(key)} - {*AFTER_UNITS}
        if not keys:
            return finished_units(output / TOKENS_FOLDER)
        if not has_documents(output / TOKENS_FOLDER):
            return set()
        same_files = (
            stored.times.keys() <= self.times.keys() and stored.plan["sources"].keys() <= here["sources"].keys()
        )
        if keys - {"sources", *(FIELDS if stored.failed else ())} or not same_files:
            return None
        if keys != {"sources"}:
            return set()
        pairs = enumerate(zip(stored.units, self.unit_hashes, strict=False))
        return {unit for unit, (old, new) in pairs if old == new}

    def _units_of(self, paths: set[str]) -> set[int]:
        return set()


class Plan(PackingPlan):
    """The plan of a build: the above and the units of work that its input is cut into."""

    def __init__(
        self, sources: list[Source], options: BuildOptions, tokenizer: Tokenizer, on_error: str = "fail"
    ) -> None:
        options = options.with_template(tokenizer)
        self.units, self.files, self.left_out = plan_units(sources, options.unit_bytes, on_error)
        source_files = {source.name: self._files_of(source.name) for source in sources}
        content = {
            "version": PLAN_VERSION,
            "tokenizer": tokenizer.info(TOKENIZER_FOLDER).model_dump(),
            **options.model_dump(),
            "sources": {
                source.name: {
                    "weight": source.weight,
                    "files": [[file.name, file.format, file.size] for file in source_files[source.name]],
                }
                for source in sources
            },
        }
        super().__init__(options, sources, content, {file.path: file.mtime_ns for file in self.files})
        self.unit_hashes = tuple(self._unit_hash(unit) for unit in self.units)

    def _unit_hash(self, unit: Unit) -> str:
        files = [(file.name, file.format, file.size) for file in self.files[unit.first_file : unit.last_file]]
        covers = unit.source, files, unit.start, unit.end, unit.first_row
        return hashlib.sha256(json.dumps(covers).encode()).hexdigest()[:16]

    def _files_of(self, source: str) -> list[InputFile]:
        ranges = [(unit.first_file, unit.last_file) for unit in self.units if unit.source == source]
        return self.files[min(first for first, _ in ranges) : max(last for _, last in ranges)]

    def unit_sources(self) -> list[int]:
        numbers = {source.name: number for number, source in enumerate(self.sources)}
        return [numbers[unit.source] for unit in self.units]

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


AFTER_UNITS = (
    *("packing", "validation_fraction", "deduplicate"),
    *("near_duplicates", "near_duplicate_sections", "ngram", "section_tokens", "decontaminate", "evaluation"),
)
"""What of a plan decides nothing about the units of its token store."""


FIELDS = (
    "filters",
    "text_field",
    "id_field",
    "source_field",
    "messages_field",
    "prompt_field",
    "response_field",
    "chat_template",
)
"""What of a plan the sentences about unreadable input advise to change."""


def plan_hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_plan(folder: Path) -> StoredPlan:
    """The plan in an output folder."""
    try:
        content = json.loads((folder / PLAN_FILE).read_bytes())
        units, failed = tuple(content.get("units", [])), bool(content.get("failed", False))
        dict(content["plan"]["sources"])
        return StoredPlan(dict(content["plan"]), dict(content["times"]), units, failed)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{folder / PLAN_FILE} is damaged: restore it, or build into another folder") from None


def write_plan(folder: Path, plan: StoredPlan) -> None:
    write_atomically(folder / PLAN_FILE, json.dumps(plan._asdict()).encode())


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
            short = [" ".join(str(value).split())[:40] for value in (old, new)]
            yield f"{name} is {short[0]} there and {short[1]} here"


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the output folder's lock; it goes when the process does, however that ends."""
    make_output(output)
    try:
        held = lock(output / LOCK_FILE)
    except BlockingIOError:
        raise ValueError(f"another build is writing to {output}: {WAIT}") from None
    with held:
        yield


def make_output(output: Path) -> None:
    """Raises ValueError where it cannot be a folder."""
    if printable(str(output)) != str(output):
        raise ValueError(f"--output {output}: a name that is not UTF-8 cannot be used; choose another --output")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"--output {output} is not a folder") from None


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files of a build that was killed."""
    for path in folder.glob("*.tmp"):
        path.unlink(missing_ok=True)


def unfinished(units: list[Unit], done: dict[int, Any]) -> list[Unit]:
    """Units still to do, the largest first so that the last ones to finish are small."""
    return sorted((unit for unit in units if unit.index not in done), key=lambda unit: -unit.size)


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
