"""When a launch began: what its launchers did before there was a rank belongs to it."""

import contextlib
import os
import time
from pathlib import Path

import psutil

from launch.signals import launchers

SUPERVISOR = "tools.supervise"
"""Lives through several launches."""


def begins_of_launch() -> list[float]:
    """Unix times at which the launchers of this process on this host and the process itself began, the earliest first."""
    found = [begin(psutil.Process())]
    for process in launchers():
        with contextlib.suppress(psutil.Error):  # it ends just now
            if SUPERVISOR not in process.cmdline()[:4]:
                found.append(begin(process))
    return sorted(found)


def begin(process: psutil.Process) -> float:
    """Unix time, to a hundredth of a second, where `create_time` counts from a boot that is known to the second."""
    try:
        ticks = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19])
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError):
        return process.create_time()
