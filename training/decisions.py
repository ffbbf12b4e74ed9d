"""What was done about spikes, one line each in RUN/decisions.jsonl, so that it is done again wherever the run is done again.

A resume, a run in another layout and a run whose folder was given the file decide up to its last step as the file says, not
by their own figures. The file is part of every later checkpoint.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from storage.atomic import write_atomically
from training.amendments import Amendment, LeaveOut, Reorder

DECISIONS_FILE = "decisions.jsonl"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Suspect(_Record):
    """A document that stood out."""

    document: int
    """Its number in the data set, which `data_prep.inspect DATA --document` takes."""
    source: str
    sample: int
    loss: float | None
    """Mean over the targets that lie in this sample, in nats; None: not finite."""
    targets: int


class SampleLeftOut(_Record):
    """One of the order of a stage, before the decision that names it."""

    sample: int
    source: str
    row: int
    epoch: int
    documents: list[int]


class Decision(_Record):
    step: int
    """The optimizer step that was a spike, counted from 1."""
    action: Literal["skip", "leave_out", "reorder"]
    reason: str
    checkpoint: int | None = None
    """Step of the checkpoint that the run went back to; None where it went on."""
    stage: int = 0
    """Whose samples are named, counted from 0."""
    suspects: list[Suspect] = []
    """The worst first."""
    samples: list[SampleLeftOut] = []
    """Those that are left out."""
    stretch: tuple[int, int] | None = None
    """First and last sample, exclusive, of those that are taken in another order."""

    @property
    def amendment(self) -> Amendment | None:
        """Of the order of its stage."""
        if self.action == "leave_out":
            return LeaveOut([sample.sample for sample in self.samples])
        return Reorder(*self.stretch, key=self.step) if self.stretch else None


def amendments_of(decisions: Sequence[Decision], stage: int) -> list[Amendment]:
    """Of the order of a stage, oldest first."""
    return [amendment for each in decisions if each.stage == stage and (amendment := each.amendment)]


def skipped(decisions: Sequence[Decision], step: int) -> bool:
    """Whether a step is not to be applied, whatever its figures."""
    return any(each.action == "skip" and each.step == step for each in decisions)


def decided_until(decisions: Sequence[Decision]) -> int:
    """Before this step nothing is left to decide."""
    return max((each.step for each in decisions), default=0)


def read_decisions(run: Path, of_checkpoint: Sequence[Decision] = ()) -> list[Decision]:
    """Those of the run's file, which begins with the ones that its checkpoint was trained with, or is made to.

    Raises ValueError where it says something else.
    """
    path = run / DECISIONS_FILE
    lines = path.read_bytes().splitlines() if path.is_file() else []
    try:
        found = [Decision.model_validate_json(line) for line in lines]
    except ValidationError as error:
        problem = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: a line is not a decision ({problem}): restore the file or remove it") from None
    common = min(len(found), len(of_checkpoint))
    if found[:common] != list(of_checkpoint[:common]):
        raise ValueError(
            f"{path} is not what the run's checkpoint was trained with: remove it, and it is written anew from the checkpoint"
        )
    return found if common == len(of_checkpoint) else list(of_checkpoint)


def write_decisions(run: Path, decisions: Sequence[Decision]) -> None:
    """All of them, in one rename."""
    if decisions:
        write_atomically(run / DECISIONS_FILE, b"".join(each.model_dump_json().encode() + b"\n" for each in decisions))
