"""What a run and its supervisor tell each other, in files of the run's folder."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

STEP = ".step"
"""The last step of a launch, kept by its first rank."""
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


def read_step(run: Path) -> int | None:
    """None before the first step of the launch."""
    try:
        return int((run / STEP).read_text())
    except (OSError, ValueError):
        return None


def forget(run: Path, file: str) -> None:
    """Take one of these files away. A folder that refuses keeps it: the run says so in its own words."""
    with contextlib.suppress(OSError):
        (run / file).unlink(missing_ok=True)


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
