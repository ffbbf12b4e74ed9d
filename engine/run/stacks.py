"""Where the ranks of a job stand: the Python stacks of each, which of them stand in the same place, and who stands apart."""

import contextlib
import sys
import threading
import traceback
from pathlib import Path
from typing import NamedTuple

from storage.atomic import write_atomically
from training.goodput import DATA

MAIN = "MainThread"


class Answer(NamedTuple):
    """What a rank says to an alarm."""

    rank: int
    phase: str
    seconds: float
    """How long it has been in this phase."""
    threads: dict[str, str]
    """Stack of each Python thread, the innermost call last."""

    @property
    def waits_for_others(self) -> bool:
        return "distributed_c10d.py" in self.threads[MAIN]

    @property
    def place(self) -> tuple[str, str]:
        """What ranks have in common that are in the same state."""
        return self.phase, self.threads[MAIN]


def stacks_here() -> dict[str, str]:
    """The stack of each Python thread of this process but the calling one, the main thread's first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = {names.get(ident, str(ident)): frame for ident, frame in sys._current_frames().items()}
    frames.pop(threading.current_thread().name, None)
    stacks = {name: "".join(traceback.format_stack(frame)) for name, frame in frames.items()}
    return {MAIN: stacks.pop(MAIN)} | stacks


def grouped(answers: list[Answer]) -> list[list[Answer]]:
    """Those in the same phase and place, the smallest group first."""
    groups: dict[tuple[str, str], list[Answer]] = {}
    for answer in answers:
        groups.setdefault(answer.place, []).append(answer)
    return sorted(groups.values(), key=lambda members: (len(members), members[0].rank))


def apart(answers: list[Answer]) -> list[Answer]:
    """Those for whom the others wait; empty where all are in the same place."""
    groups = grouped(answers)
    if len(groups) == 1:
        return []
    free = [answer for answer in answers if not answer.waits_for_others]
    without_data = [answer for answer in answers if answer.phase == DATA]
    for odd in (free, without_data):
        if 0 < len(odd) < len(answers):
            return min(grouped(odd), key=len)
    return groups[0]


def write_text(file: Path, text: str) -> None:
    """Where the file system allows it."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, text.encode())
