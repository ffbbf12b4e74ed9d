"""What a run and its supervisor tell each other, in files of its folder (see `launch/supervisor.py`)."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from launch.supervisor import RESTART, STEP


class StepFile:
    """The last step that was done, for whoever wants to know after a kill. Only the first rank has one."""

    def __init__(self, run: Path) -> None:
        self._file = os.open(run / STEP, os.O_WRONLY | os.O_CREAT, 0o666)

    def mark(self, step: int) -> None:
        with contextlib.suppress(OSError):  # a full disk will be said of more important files
            os.pwrite(self._file, f"{step:12d}\n".encode(), 0)

    def close(self) -> None:
        os.close(self._file)


def taken_restart(run: Path) -> dict[str, Any]:
    """What the supervisor says of this launch, where it is a restart; said once."""
    try:
        told = json.loads((run / RESTART).read_bytes())
        (run / RESTART).unlink()
    except (OSError, ValueError):
        return {}
    return told
