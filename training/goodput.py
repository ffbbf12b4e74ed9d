"""Where the wall time of a run went, over all its launches: `RUN/goodput.json`.

A process is in one phase at a time, so the seconds of its phases add up to its life. What lies between the last that was
heard of a launch and the beginning of the next is the next one's `restart`, and the steps that it does again are its
`recomputed`. So the kinds add up to the time from the first beginning to now, whatever was killed when.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from storage.atomic import write_atomically

GOODPUT_FILE = "goodput.json"

START, DATA, UPDATE, BETWEEN = "start", "waiting for data", "forward, backward and update", "between steps"
VALIDATION, SAVE, REWIND, END = "validation", "save", "rewind", "end"

KINDS = {
    "productive": "forward, backward and update of steps, when they are done for the first time",
    "recomputed": "the same of steps that had been done before, by a launch that was lost or before a rewind",
    "save_stall": "training stands still for a checkpoint",
    "data_wait": "samples are awaited",
    "start_up": "from the beginning of a launch to its first step: processes, imports, engine, weights",
    "validation": "loss on the validation sets",
    "restart": "from the last that was heard of a launch to the next one, a step that was cut short, going back in a rewind",
    "rest": "reports, agreements between ranks, the end",
}
OF_PHASE = {
    START: "start_up",
    DATA: "data_wait",
    BETWEEN: "rest",
    VALIDATION: "validation",
    SAVE: "save_stall",
    REWIND: "restart",
    END: "rest",
}
"""Of a step's own phase, `UPDATE`, the kind depends on the step."""
WRITING_SHARE = 1e-3
"""Of the time, that keeping the file may take."""


class PhaseClock:
    """Which phase this process is in, and how long it has been in each."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self.phase, self._since = now, START, now()
        self._seconds: dict[str, float] = {}

    @property
    def phase_seconds(self) -> float:
        """How long it has been in this one."""
        return self._now() - self._since

    def enter(self, phase: str) -> None:
        """Another phase from now on."""
        now = self._now()
        self._seconds[self.phase] = self._seconds.get(self.phase, 0.0) + now - self._since
        self.phase, self._since = phase, now

    @contextlib.contextmanager
    def aside(self, phase: str) -> Iterator[None]:
        """Another phase in here; the one before goes on afterwards, if no error ends it."""
        before = self.phase
        self.enter(phase)
        yield
        self.enter(before)

    def take(self) -> dict[str, float]:
        """The seconds of each phase since the last time."""
        self.enter(self.phase)
        taken, self._seconds = self._seconds, {}
        return taken


class LaunchTimes(BaseModel):
    """One launch of a run, by its first rank."""

    model_config = ConfigDict(extra="forbid")

    began: float
    """Unix time, as is `heard`, up to which it is accounted for."""
    heard: float
    after_step: int
    """Where it began or continued."""
    step: int
    """The last that it did."""
    recomputed_steps: int = 0
    reason: str = ""
    """Why a supervisor began it."""
    exit_code: int | None = None
    """None: it was killed, failed, or goes on."""
    seconds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    """By kind; they add up to the time since the launch before was heard of last, or since this one began if it is the first."""


class RunTimes(BaseModel):
    """The content of `RUN/goodput.json`."""

    model_config = ConfigDict(extra="forbid")

    furthest_step: int = 0
    launches: list[LaunchTimes] = []

    @property
    def seconds(self) -> dict[str, float]:
        """By kind, over all launches."""
        return {kind: sum(launch.seconds.get(kind, 0.0) for launch in self.launches) for kind in KINDS}

    @property
    def words(self) -> str:
        """One line."""
        seconds, count = self.seconds, len(self.launches)
        total = sum(seconds.values())
        first, *others = (
            f"{kind.replace('_', ' ')} {share_of(seconds, kind):.1%}"
            for kind in KINDS
            if kind == "productive" or seconds[kind]
        )
        where = f"{timedelta(seconds=round(total))} in {count} launch{'es' * (count > 1)}"
        return f"goodput of {where}: {first} | {', '.join(others)}"


def share_of(seconds: Mapping[str, float], kind: str = "productive") -> float:
    """Of a kind in the sum of all."""
    return seconds[kind] / (sum(seconds.values()) or 1.0)


def read_times(run: Path) -> RunTimes | None:
    """None where there are none. Raises ValueError where the file is damaged."""
    path = run / GOODPUT_FILE
    try:
        return RunTimes.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError):
        raise ValueError(f"{path} cannot be read: remove it, and times are counted anew") from None


class Goodput:
    """Keeps the times of a run while this launch lives."""

    def __init__(
        self,
        run: Path,
        clock: PhaseClock,
        step: int,
        begins: Sequence[float],
        reason: str = "",
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`step`: the run continues after it. `begins`: Unix times at which the launch may have begun, the earliest first: the
        first counts at which the launch before was no longer heard of.

        A launch after one that finished the run begins a time of its own. Raises ValueError where the file is damaged.
        """
        self._run, self._clock, self._wall = run, clock, wall
        self._folder = run.stat()
        self.times = read_times(run) or RunTimes()
        before = self.times.launches[-1] if self.times.launches else None
        heard = before.heard if before else begins[0]
        began = next((begin for begin in begins if begin >= heard), begins[-1])
        self._launch = LaunchTimes(began=began, heard=began, after_step=step, step=step, reason=reason)
        if before and before.exit_code != 0:
            self._add("restart", max(0.0, began - heard), lived=False)
        self._add("start_up", max(0.0, wall() - began - clock.phase_seconds))
        self.times.launches.append(self._launch)
        self._unassigned, self._next_writing = 0.0, 0.0
        self.keep()

    def step_done(self, step: int) -> None:
        """What was computed since the one before belongs to this step."""
        self._collect()
        again = step <= self.times.furthest_step
        self._assign("recomputed" if again else "productive")
        self._launch.recomputed_steps += again
        self._launch.step, self.times.furthest_step = step, max(step, self.times.furthest_step)

    def keep(self) -> None:
        """Write the file, if that has not been done too lately to be worth its time."""
        if self._wall() >= self._next_writing:
            self._collect()
            self._write()

    def close(self, exit_code: int | None) -> None:
        """None: an error has ended the run, and what was computed of a step is lost."""
        self._collect()
        self._assign("restart")
        self._launch.exit_code = exit_code
        self._write()

    def _collect(self) -> None:
        for phase, seconds in self._clock.take().items():
            if phase == UPDATE:
                self._unassigned += seconds
            else:
                self._add(OF_PHASE[phase], seconds)

    def _assign(self, kind: str) -> None:
        self._add(kind, self._unassigned)
        self._unassigned = 0.0

    def _add(self, kind: str, seconds: float, lived: bool = True) -> None:
        self._launch.seconds[kind] += seconds
        self._launch.heard += seconds * lived

    def _write(self) -> None:
        began = self._wall()
        with contextlib.suppress(
            OSError
        ):  # a full disk, or a folder that is gone, will be said of more important files
            if os.path.samestat(self._run.stat(), self._folder):
                write_atomically(self._run / GOODPUT_FILE, self.times.model_dump_json(indent=1).encode())
        self._next_writing = self._wall() + (self._wall() - began) / WRITING_SHARE
