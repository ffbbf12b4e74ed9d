"""What a run and its supervisor tell each other, in files of the run's folder."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

STEP = ".step"
"""The last step that was done, kept by the first rank."""
RESTART = ".restart.json"
"""What the next launch has to report of its restart."""


class StepFile:
    """The last step that was done, for whoever wants to know after a kill. Only the first rank has one."""

    def __init__(self, run: Path) -> None:
        self._file = os.open(run / STEP, os.O_WRONLY | os.O_CREAT, 0o666)

    def mark(self, step: int) -> None:
        with contextlib.suppress(OSError):  # a full disk will be said of more important files
            os.pwrite(self._file, f"{step:12d}\n".encode(), 0)

    def close(self) -> None:
        os.close(self._file)


def step_mark(run: Path) -> tuple[int, str] | None:
    """When the last step was marked, and what it was. No launch takes it away: on other hosts of it others may read it."""
    try:
        return (run / STEP).stat().st_mtime_ns, (run / STEP).read_text()
    except OSError:
        return None


def step_since(run: Path, before: tuple[int, str] | None) -> int | None:
    """The last step of a launch; None before its first. `before`: the mark when it began."""
    mark = step_mark(run)
    return int(mark[1]) if mark and mark != before and mark[1].strip().isdecimal() else None


def forget_restart(run: Path) -> None:
    with contextlib.suppress(OSError):
        (run / RESTART).unlink()


def tell_restart(run: Path, told: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        (run / RESTART).write_text(json.dumps(told))


def taken_restart(run: Path) -> dict[str, Any]:
    """What the supervisor says of this launch, where it is a restart; said once."""
    try:
        told = json.loads((run / RESTART).read_bytes())
        (run / RESTART).unlink()
    except (OSError, ValueError):
        return {}
    return told
