"""What is known of each unit of a token store that is finished: a file beside the unit's, written after it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from data_prep.records import Filtered, LeftOut
from storage.atomic import own_temporary, write_atomically


class Ledger(BaseModel):
    """What is known of a finished unit."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    unit: int
    plan_sha256: str
    input_sha256: str
    sha256: str
    file_bytes: int
    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    unknown: int = 0
    fallback: int = 0
    targets: Annotated[int | None, Field(exclude_if=lambda count: count is None)] = None
    """Tokens that carry loss, where not all do."""
    empty: int = 0
    skipped: dict[str, int] = {}
    examples: list[str] = []
    left_out: list[LeftOut] = []
    filtered: Annotated[list[Filtered], Field(exclude_if=lambda refused: not refused)] = []
    """Documents that filters left out."""
    disagreed: bool = False
    """The accelerated encoder gave other ids, so the reference encoder did the unit."""

    def without_lists(self) -> "Ledger":
        """What is held of every unit; `filtered_of` reads again what filters left out."""
        return self.model_copy(update={"filtered": []})


def unit_path(folder: Path, unit: int) -> Path:
    """The file with a unit's tokens; its ledger lies beside it."""
    return folder / f"unit-{unit:05d}.arrow"


def write_ledger(folder: Path, ledger: Ledger) -> None:
    path = unit_path(folder, ledger.unit).with_suffix(".json")
    write_atomically(path, ledger.model_dump_json(indent=1).encode(), own_temporary(path))


def read_ledger(folder: Path, unit: int, plan_sha256: str) -> Ledger | None:
    """The ledger of a unit if it is finished, belongs to this plan, and its file has the size it says."""
    path = unit_path(folder, unit)
    try:
        ledger = Ledger.model_validate_json(path.with_suffix(".json").read_bytes())
        intact = ledger.plan_sha256 == plan_sha256 and path.stat().st_size == ledger.file_bytes
    except (OSError, ValueError):
        return None
    return ledger if intact else None


def _ledgers(folder: Path) -> Iterator[Ledger]:
    for path in sorted(folder.glob("unit-*.json")):
        try:
            yield Ledger.model_validate_json(path.read_bytes())
        except (OSError, ValueError):
            continue


def filtered_of(folder: Path) -> Iterator[Filtered]:
    """All documents of a finished store that filters left out, in order."""
    for ledger in _ledgers(folder):
        yield from ledger.filtered


def has_documents(folder: Path) -> bool:
    """Does a store, finished or not, hold any document?"""
    return any(ledger.documents for ledger in _ledgers(folder))


def finished_units(folder: Path) -> set[int]:
    """The units of a store, finished or not, that have a ledger, of whatever plan."""
    return {ledger.unit for ledger in _ledgers(folder)}


def take_over_units(folder: Path, plan_before: str, plan_sha256: str, kept: set[int]) -> None:
    """Give the finished units `kept` of one plan to another, which would make the same; the others are removed."""
    for ledger in _ledgers(folder):
        if ledger.unit in kept and ledger.plan_sha256 == plan_before:
            write_ledger(folder, ledger.model_copy(update={"plan_sha256": plan_sha256}))
    wanted = {path.stem for unit in kept for path in [unit_path(folder, unit)]}
    for path in folder.glob("*"):
        if path.stem not in wanted:
            path.unlink(missing_ok=True)
