"""How launches end, and whether to start again after it: what a launcher says, as reasons."""

import contextlib
import csv
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from launch.signals import EXIT_HUNG, EXIT_INTERRUPTED, EXIT_RUN_AGAIN

EXIT_BAD_INPUT = 2
FINAL = (0, EXIT_BAD_INPUT, EXIT_RUN_AGAIN, EXIT_INTERRUPTED)
SAID_CODE = re.compile(rb"exits with return code = (-?\d+)|exitcode\s*: (-?\d+)")
"""How DeepSpeed's and torch's launchers, which have codes of their own, say that of a rank."""
SAID_LOST = re.compile(rb"pdsh@\S+: (\S+): ssh exited with exit code 255")
SAID_APART = re.compile(rb"\bRendezvous(Closed|Connection|Timeout)Error\b")
"""As torchrun does, when those of the other hosts have not ended yet, or are not there again."""
SAID_WHO = re.compile(r"^\s+(host|rank) +: (\S+)")
"""In torchrun's words on the rank that failed first, the only ones on one that was killed."""
SAID_ERROR = re.compile(r"(?:^|: )error: (.*)")
SAID_BY_SLURM = re.compile(r"^(?:srun|slurmstepd\S*): error: (.*)")
"""Of any task that ended, after what its rank has told; the first of them is of the one that ended first."""
MOST_NAMED = 20


class Ending(NamedTuple):
    """How a launch ended."""

    code: int
    step: int | None
    """The last one that it did; None before its first."""
    words: str
    """The last error that a rank has told."""
    lost: tuple[str, ...] = ()
    """Hosts that do not answer any more."""
    returned: tuple[str, ...] = ()
    """Hosts for which it was told to save and end: they answer again."""
    apart: bool = False
    """Its launcher has not met those of the other hosts."""

    @property
    def reason(self) -> str:
        if self.lost or self.returned:
            return f"lost {', '.join(self.lost)}" if self.lost else f"{', '.join(self.returned)} is back"
        killed = self.code < 0 or self.code > 128
        kind = "hung" if self.code == EXIT_HUNG else "killed" if killed else f"exit code {self.code}"
        return f"{kind}: {self.words}" if self.words else kind

    def same_as(self, other: "Ending") -> bool:
        """Whether it failed at the same step for the same reason, whatever the seconds and process ids."""
        plain = [re.sub(r"\d+(\.\d+)?", "N", ending.reason) for ending in (self, other)]
        return self.step == other.step and plain[0] == plain[1] and not self.lost


def why_not_again(ending: Ending, earlier: Sequence[Ending], most: int) -> str:
    """Why a restart cannot help or is not wanted; empty where it may. `earlier`: endings before that were restarted."""
    if ending.code == 0:
        return "finished"
    if not ending.lost and not ending.returned:
        if ending.code in FINAL:
            return "it was asked to stop" if ending.code != EXIT_BAD_INPUT else "what it says has to be mended"
        if ending.step is None:
            return "it ended before its first step, which a restart does not cure"
        if any(ending.same_as(other) for other in earlier):
            return f"step {ending.step + 1} failed a second time for the same reason: look at its documents"
    return "" if len(earlier) < most else f"it was restarted {most} times (--max-restarts)"


class Listener:
    """Passes on what a launch says on standard error, and remembers what it has said of its end."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.words, self._slurm_words, self.apart, self._codes = "", "", False, list[int]()
        self._who: dict[str, str] = {}
        self.lost: set[str] = set()
        """Hosts whose ssh has ended without a word of theirs."""
        self._process = process
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def join(self) -> None:
        self._thread.join(5.0)  # a process that has left the launch may keep its end of the pipe
        if not self.words and len(self._who) == 2:
            self.words = "{host} (rank {rank})".format(**self._who)
        self.words = self.words or self._slurm_words

    def code(self, of_launcher: int) -> int:
        """That of the rank which ended first, where the launcher has told; else the launcher's, as a shell says it.

        After a launcher that was killed its ranks save and end as if they had been asked to: that is not told.
        """
        if of_launcher in (-signal.SIGKILL, 128 + signal.SIGKILL):
            return 128 + signal.SIGKILL
        told = [code for code in FINAL if code and code in self._codes]
        code = [*told, *(code for code in self._codes if code), of_launcher][0] if of_launcher else 0
        return 128 - code if -signal.NSIG < code < 0 else code

    def _listen(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            with contextlib.suppress(OSError):
                os.write(2, line)
            if code := SAID_CODE.search(line):
                self._codes.append(int(code[1] or code[2]))
            if lost := SAID_LOST.search(line):
                self.lost.add(lost[1].decode())
            self.apart = self.apart or bool(SAID_APART.search(line))
            text = line.decode(errors="replace").rstrip()
            if told := SAID_BY_SLURM.match(text):
                self._slurm_words = self._slurm_words or told[1]
            elif error := SAID_ERROR.search(text):
                self.words = error[1]
            elif who := SAID_WHO.search(text):
                self._who[who[1]] = who[2]


def documents_of_step(run: Path, step: int) -> str:
    """A sentence; asked of `tools.ledger` in another process, which needs torch."""
    command = [sys.executable, "-m", "tools.ledger", str(run), "--step", str(step)]
    answer = subprocess.run([*command, "--csv"], capture_output=True, stdin=subprocess.DEVNULL, text=True).stdout
    lines = list(csv.DictReader(answer.splitlines()))
    named = list(
        dict.fromkeys(f"{key} of {line['source']}" for line in lines for key in shlex.split(line["documents"]))
    )
    if not named:
        return f"the documents of step {step} are not known"
    more = f" and {len(named) - MOST_NAMED} more: {shlex.join(command[1:])}" if len(named) > MOST_NAMED else ""
    return f"step {step} has the documents {', '.join(named[:MOST_NAMED])}{more}"
