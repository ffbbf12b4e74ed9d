"""Starts a run, and starts it again where that can help: after a hang, a killed rank or a lost host.

The ranks are told by SIGUSR1 to save and end, each on its own host; their launcher ignores it. How far the run has come it
says in a file of its folder, and what ended it by exit codes and its last words. Nothing here needs torch.
"""

import contextlib
import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from launch.hostfile import read_hostfile
from launch.remote import where_it_works
from launch.signals import EXIT_HUNG, EXIT_INTERRUPTED, EXIT_RUN_AGAIN, LAUNCHER_MODULES, LAUNCHERS

STEP = ".step"
"""In the folder of a run: its last step; the supervisor takes the file away before a launch."""
RESTART = ".restart.json"
"""There too: what the next launch has to report of its restart."""

EXIT_BAD_INPUT = 2
FINAL = (0, EXIT_BAD_INPUT, EXIT_RUN_AGAIN, EXIT_INTERRUPTED)
SAID_CODE = re.compile(rb"exits with return code = (-?\d+)|exitcode\s*: (-?\d+)")
"""How DeepSpeed's and torch's launchers, which have codes of their own, say that of a rank."""
SAID_LOST = re.compile(rb"pdsh@\S+: (\S+): ssh exited with exit code 255")
SAID_ERROR = re.compile(r"(?:^|: )error: (.*)")

MOST_NAMED = 20
LONGEST_PAUSE_SECONDS = 60.0
TELL_SECONDS = 2.0
"""How often ranks are told: those that are not there yet have no ears; more than once changes nothing."""
PROBE_SECONDS = 5.0
RETURN_SECONDS = 15.0
"""How often missing hosts are looked for, which must answer twice in a row."""
NOTICE_HOST = "-o ServerAliveInterval=5 -o ServerAliveCountMax=4"
"""Lets pdsh end soon after a host has vanished without closing its connection."""
WRAPPER = f'trap "" USR1; export PDSH_SSH_ARGS_APPEND="$PDSH_SSH_ARGS_APPEND {NOTICE_HOST}"; exec "$@"'


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


class Supervisor:
    """One run. `words`: train.py and its arguments, or any launcher's command that has them."""

    def __init__(self, words: list[str], hostfile: Path | None, most: int, grace_seconds: float) -> None:
        self._words, self._most, self._grace = words, most, grace_seconds
        self._script = next((number for number, word in enumerate(words) if Path(word).name == "train.py"), None)
        self._output = flag_of(words, "--output")
        if self._script is None or not self._output:
            raise ValueError("give the command after --: train.py and its arguments, --output among them")
        if hostfile and self._script:
            raise ValueError("--hostfile is for `deepspeed`: let the words after -- begin with train.py")
        self._run = Path(self._output)
        self._hosts = read_hosts(hostfile) if hostfile else {}
        self._known: dict[int, int] = {}
        self._asking = threading.Lock()
        self._requests: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda heard, _: self._requests.append(heard))

    def run(self) -> int:
        """The exit code of the last launch."""
        earlier: list[Ending] = []
        here = self._answering() if self._hosts else []
        threading.Thread(target=self._foresee, daemon=True).start()
        while True:
            slots = self._slots(here)
            ending = self._launch(slots)
            if self._requests:
                break
            if self._hosts:
                here, before = self._answering(), here
                ending = ending._replace(lost=tuple(host for host in before if host not in here))
            if sentence := why_not_again(ending, earlier, self._most):
                say(f"not restarted: {sentence}" + (f" ({ending.reason})" if ending.code else ""))
                if ending.step is not None and sentence.endswith("look at its documents"):
                    say(documents_of_step(self._run, ending.step + 1))
                return ending.code
            earlier.append(ending)
            self._announce(earlier, here)
            self._end_all(signal.SIGKILL, here)
            if self._requests:
                break
        return EXIT_INTERRUPTED if self._requests[0] == signal.SIGINT else ending.code

    def _announce(self, earlier: list[Ending], here: list[str]) -> None:
        """Say why the run begins anew, let it report that, and wait: longer where it has not come further than before."""
        ending, at_once = earlier[-1], bool(earlier[-1].lost or earlier[-1].returned)
        stuck = sum((each.step or 0) >= (ending.step or 0) for each in earlier)
        pause = 0.0 if at_once else min(LONGEST_PAUSE_SECONDS, 2.0 ** (stuck - 1))
        told: dict[str, Any] = {"number": len(earlier), "reason": ending.reason}
        if ending.step is not None:
            told["after_step"] = ending.step
        if self._hosts:
            told["hosts"] = here
        say(f"restart {len(earlier)} of at most {self._most} in {pause:g} s, after step {ending.step}: {ending.reason}")
        with contextlib.suppress(OSError):
            (self._run / RESTART).write_text(json.dumps(told))
        until = time.monotonic() + pause
        while time.monotonic() < until and not self._requests:
            time.sleep(0.1)

    def _answering(self) -> list[str]:
        found = where_it_works(self._hosts, "true", PROBE_SECONDS)
        return [host for host in self._hosts if host in found]

    def _slots(self, here: list[str]) -> dict[str, int]:
        """How many ranks to start where: on fewer hosts the most with which the run can be continued."""
        self._absent = [host for host in self._hosts if host not in here]
        if not self._absent:
            return self._hosts
        most = sum(self._hosts[host] for host in here)
        left, slots = self._legal(most), dict[str, int]()
        if not left:
            raise ValueError(f"no layout of the run is legal on {most} ranks, of {', '.join(here) or 'no host'}")
        for host in here:
            if taken := min(left, self._hosts[host]):
                slots[host], left = taken, left - taken
        return slots

    def _gains(self, back: set[str], slots: dict[str, int]) -> bool:
        """Whether the run can be continued on more ranks than it has, now that these hosts are back."""
        absent = [host for host in self._absent if host not in back]
        most = sum(count for host, count in self._hosts.items() if host not in absent)
        return not absent or self._legal(most) > sum(slots.values())

    def _legal(self, most: int) -> int:
        """The most ranks, of these, with which the run can be continued; asked in another process, which needs torch."""
        with self._asking:
            if most and most not in self._known:
                ask = [sys.executable, "-m", "tools.legal_ranks", str(most), "--", *self._words]
                answer = subprocess.run(ask, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True).stdout
                self._known[most] = int((answer.split() or ["0"])[-1])
            return self._known.get(most, 0)

    def _foresee(self) -> None:
        """Know beforehand what can be done without one of the hosts: to ask takes as long as to notice that one is lost."""
        for without in set(self._hosts.values()):
            self._legal(sum(self._hosts.values()) - without)

    def _command(self, slots: dict[str, int], folder: Path) -> list[str]:
        words = self._words
        if not self._script:
            words = ["deepspeed", *words]
        if slots:
            hostfile = folder / "hosts"
            hostfile.write_text("".join(f"{host} slots={count}\n" for host, count in slots.items()))
            words = ["deepspeed", "--hostfile", str(hostfile), "--force_multi", *self._words]
        return words if Path(words[0]).name == "srun" else ["sh", "-c", WRAPPER, "sh", *words]

    def _launch(self, slots: dict[str, int]) -> Ending:
        (self._run / STEP).unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(prefix="supervise-") as folder:
            command = self._command(slots, Path(folder))
            process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
            heard = Listener(process)
            returned = self._follow(process, heard, slots)
            heard.join()
            (self._run / RESTART).unlink(missing_ok=True)  # of a launch that had no time to report it
        return Ending(heard.code(process.returncode), self._step(), heard.words, (), returned)

    def _follow(self, process: subprocess.Popen, heard: "Listener", slots: dict[str, int]) -> tuple[str, ...]:
        """Until the launch has ended, which it is told to when this process is, or when a missing host is back."""
        told, deadline, looked, seen = 0.0, float("inf"), time.monotonic(), set[str]()
        returned: tuple[str, ...] = ()
        ended = False
        while process.poll() is None or self._ranks_here():
            now = time.monotonic()
            if self._absent and not returned and now - looked > RETURN_SECONDS:
                found = where_it_works(self._absent, "true", PROBE_SECONDS)
                if (twice := found & seen) and self._step() is not None and self._gains(twice, slots):
                    returned = tuple(sorted(twice))
                looked, seen = time.monotonic(), found
            if (self._requests or returned) and now - told > TELL_SECONDS:
                deadline, told = min(deadline, now + self._grace), now
                self._tell(process, slots)
            if now > deadline or (not ended and self._requests.count(signal.SIGINT) > 1):
                say(f"ends what is left after {self._grace:g} s" if now > deadline else "ends, interrupted again")
                self._end_all(signal.SIGKILL, list(slots))
                os.killpg(process.pid, signal.SIGKILL)
                ended, deadline = True, now + self._grace
            if heard.lost and not ended:
                gone = heard.lost - where_it_works(heard.lost, "true", PROBE_SECONDS)
                heard.lost, ended = set(), bool(gone)
                self._end_all(signal.SIGKILL, [host for host in slots if host not in gone] if gone else [])
            if process.returncode is not None:  # its ranks notice that, and save
                deadline = min(deadline, now + self._grace)
            time.sleep(0.2)
        return returned

    def _tell(self, process: subprocess.Popen, slots: dict[str, int]) -> None:
        self._end_all(signal.SIGUSR1, list(slots))
        if Path(self._words[0]).name == "srun":  # passes it on
            process.send_signal(signal.SIGUSR1)

    def _end_all(self, number: int, hosts: list[str]) -> None:
        """A signal for every rank of this run, here and there."""
        for rank in self._ranks_here():
            with contextlib.suppress(psutil.Error):
                rank.send_signal(number)
        pattern = rf"train[.]py --local_rank=.* --output[ =]{re.escape(self._output)}( |$)"
        where_it_works(hosts, f"pkill -{int(number)} -f {shlex.quote(pattern)}", PROBE_SECONDS)

    def _ranks_here(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and self._is_rank(process.cmdline()):
                    found.append(process)
        return found

    def _is_rank(self, words: list[str]) -> bool:
        is_launcher = any(Path(word).name in LAUNCHERS or word in LAUNCHER_MODULES for word in words[:4])
        is_ours = "train.py" in [Path(word).name for word in words[1:4]] and flag_of(words, "--output") == self._output
        return is_ours and not is_launcher

    def _step(self) -> int | None:
        try:
            return int((self._run / STEP).read_text())
        except (OSError, ValueError):
            return None


class Listener:
    """Passes on what a launch says on standard error, and remembers what it has said of its end."""

    def __init__(self, process: subprocess.Popen) -> None:
        self.words, self._codes = "", list[int]()
        self.lost: set[str] = set()
        """Hosts whose ssh has ended without a word of theirs."""
        self._process = process
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def join(self) -> None:
        self._thread.join(5.0)  # a process that has left the launch may keep its end of the pipe

    def code(self, of_launcher: int) -> int:
        """That of the rank which ended first, where the launcher has told; else the launcher's."""
        told = [code for code in FINAL if code and code in self._codes]
        return [*told, *(code for code in self._codes if code), of_launcher][0] if of_launcher else 0

    def _listen(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            with contextlib.suppress(OSError):
                os.write(2, line)
            if code := SAID_CODE.search(line):
                self._codes.append(int(code[1] or code[2]))
            if lost := SAID_LOST.search(line):
                self.lost.add(lost[1].decode())
            if error := SAID_ERROR.search(line.decode(errors="replace").rstrip()):
                self.words = error[1]


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


def read_hosts(hostfile: Path) -> dict[str, int]:
    hosts, problems = read_hostfile(hostfile)
    if problems:
        raise ValueError("; ".join(problems))
    return hosts


def flag_of(words: Sequence[str], flag: str) -> str:
    """What follows the last such flag; empty where there is none."""
    given = [word.partition("=")[2] for word in words if word.startswith(f"{flag}=")]
    given += [after for word, after in pairwise(words) if word == flag]
    return given[-1] if given else ""


def say(sentence: str) -> None:
    print(f"supervisor: {sentence}", file=sys.stderr, flush=True)
