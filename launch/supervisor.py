"""Starts a run, and starts it again where that can help: after a hang, a killed rank or a lost host.

The ranks are told by SIGUSR1 to save and end, each on its own host; their launcher ignores it. How far the run has come it
says in a file of its folder, and what ended it by exit codes and its last words. Nothing here needs torch.
"""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

from launch.endings import Ending, Listener, documents_of_step, why_not_again
from launch.remote import where_it_works
from launch.signals import EXIT_INTERRUPTED, EXIT_RUN_AGAIN, LAUNCHER_MODULES, LAUNCHERS
from launch.slots import Slots
from launch.told import forget_restart, step_mark, step_since, tell_restart

LONGEST_PAUSE_SECONDS = 60.0
TELL_SECONDS = 2.0
"""How often ranks are told: those that are not there yet have no ears; more than once changes nothing."""
PROBE_SECONDS, SECOND_LOOK_SECONDS = 5.0, 2.5
"""For which a host may take to answer, and one to which the connection has ended."""
RETURN_SECONDS = 15.0
"""How often missing hosts are looked for, which must answer twice in a row."""
MEET_SECONDS = 2.0
"""Until a restart is tried again that has not met the launchers of other hosts: these may still be saving."""
NOTICE_HOST = "-o ServerAliveInterval=2 -o ServerAliveCountMax=5"
"""Lets pdsh end soon after a host has vanished without closing its connection: a heartbeat to every host."""
WRAPPER = f'trap "" USR1; export PDSH_SSH_ARGS_APPEND="$PDSH_SSH_ARGS_APPEND {NOTICE_HOST}"; exec "$@"'


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
        self._slots = Slots(hostfile, words)
        self._requests: list[int] = []
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda heard, _: self._requests.append(heard))

    def run(self) -> int:
        """The exit code of the last launch."""
        earlier: list[Ending] = []
        here, begun = self._answering(), 0.0
        threading.Thread(target=self._slots.foresee, daemon=True).start()
        while True:
            ending, after = self._launch(self._slots.on(here), here)
            if self._requests:
                break
            if ending.apart and earlier and time.monotonic() < begun + self._grace:
                time.sleep(MEET_SECONDS)
                continue
            ending = ending._replace(lost=tuple(host for host in here if host not in after))
            here = after
            if sentence := why_not_again(ending, earlier, self._most):
                say(f"not restarted: {sentence}" + (f" ({ending.reason})" if ending.code else ""))
                if ending.step is not None and sentence.endswith("look at its documents"):
                    say(documents_of_step(self._run, ending.step + 1))
                return ending.code
            earlier.append(ending)
            self._announce(earlier, here)
            begun = time.monotonic()
            if self._requests:
                break
        if self._requests[0] == signal.SIGINT:
            return EXIT_INTERRUPTED
        return EXIT_RUN_AGAIN if ending.code == 128 + signal.SIGUSR1 else ending.code  # told before it could listen

    def _announce(self, earlier: list[Ending], here: list[str]) -> None:
        """Say why the run begins anew, let it report that, and wait: longer where it has not come further than before."""
        ending, at_once = earlier[-1], bool(earlier[-1].lost or earlier[-1].returned)
        stuck = sum((each.step or 0) >= (ending.step or 0) for each in earlier)
        pause = 0.0 if at_once else min(LONGEST_PAUSE_SECONDS, 2.0 ** (stuck - 1))
        told: dict[str, Any] = {"number": len(earlier), "reason": ending.reason}
        if ending.step is not None:
            told["after_step"] = ending.step
        if here:
            told["hosts"] = here
        say(f"restart {len(earlier)} of at most {self._most} in {pause:g} s, after step {ending.step}: {ending.reason}")
        tell_restart(self._run, told)
        until = time.monotonic() + pause
        while time.monotonic() < until and not self._requests:
            time.sleep(0.1)

    def _answering(self) -> list[str]:
        found = where_it_works(self._slots.hosts, "true", PROBE_SECONDS)
        return [host for host in self._slots.hosts if host in found]

    def _command(self, slots: dict[str, int], folder: Path) -> list[str]:
        words = self._words
        if not self._script:
            words = ["deepspeed", *words]
        if slots:
            hostfile = folder / "hosts"
            hostfile.write_text("".join(f"{host} slots={count}\n" for host, count in slots.items()))
            words = ["deepspeed", "--hostfile", str(hostfile), "--force_multi", "--no_ssh_check", *self._words]
        return words if Path(words[0]).name == "srun" else ["sh", "-c", WRAPPER, "sh", *words]

    def _launch(self, slots: dict[str, int], here: list[str]) -> tuple[Ending, list[str]]:
        """How it ended, and the hosts that answer then; no rank of it is left on them."""
        self._mark = step_mark(self._run)
        with tempfile.TemporaryDirectory(prefix="supervise-") as folder:
            command = self._command(slots, Path(folder))
            process = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
            heard = Listener(process)
            returned, broken = self._follow(process, heard, slots, here)
            if broken:  # so nothing of this launch can end well
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            answering = self._end_all(signal.SIGKILL, [host for host in self._slots.hosts if host not in broken])
            process.wait()
            heard.join()
            if not heard.apart:
                forget_restart(self._run)  # of a launch that had no time to report it
        words = f"no answer from {', '.join(sorted(broken))}" if broken else heard.words
        ending = Ending(
            heard.code(process.returncode), step_since(self._run, self._mark), words, (), returned, heard.apart
        )
        return ending, [host for host in here if host in answering] if not returned else answering

    def _follow(
        self, process: subprocess.Popen, heard: Listener, slots: dict[str, int], here: list[str]
    ) -> tuple[tuple[str, ...], set[str]]:
        """Until the launch has ended, which it is told to when this process is, or when a missing host is back, or until a
        host is lost: the hosts that are back, and those that are lost, it seems."""
        told, deadline, looked, seen = 0.0, float("inf"), time.monotonic(), set[str]()
        absent = [host for host in self._slots.hosts if host not in here]
        returned: tuple[str, ...] = ()
        ended = False
        while process.poll() is None or self._ranks_here():
            now = time.monotonic()
            if absent and not returned and now - looked > RETURN_SECONDS:
                found = where_it_works(absent, "true", PROBE_SECONDS)
                twice = found & seen
                if (
                    twice
                    and step_since(self._run, self._mark) is not None
                    and self._slots.gains({*here, *twice}, slots)
                ):
                    returned = tuple(sorted(twice))
                looked, seen = time.monotonic(), found
            if (self._requests or returned) and now - told > TELL_SECONDS:
                deadline, told = min(deadline, now + self._grace), now
                self._tell(process, slots)
            if now > deadline or (not ended and self._requests.count(signal.SIGINT) > 1):
                say(f"ends what is left after {self._grace:g} s" if now > deadline else "ends, interrupted again")
                self._end_all(signal.SIGKILL, slots)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                ended, deadline = True, now + self._grace
            if heard.lost and not ended:
                silent, heard.lost = heard.lost, set()
                if gone := silent - where_it_works(silent, "true", SECOND_LOOK_SECONDS):
                    return returned, gone
            if process.returncode is not None:  # its ranks notice that, and save
                deadline = min(deadline, now + self._grace)
            time.sleep(0.2)
        return returned, set()

    def _tell(self, process: subprocess.Popen, slots: dict[str, int]) -> None:
        self._end_all(signal.SIGUSR1, slots)
        if Path(self._words[0]).name == "srun":  # passes it on
            process.send_signal(signal.SIGUSR1)

    def _end_all(self, number: int, hosts: Iterable[str]) -> list[str]:
        """A signal for every rank of this run, here and there; with SIGKILL for what started them there, too. The hosts
        that could be asked."""
        for rank in self._ranks_here():
            with contextlib.suppress(psutil.Error):
                rank.send_signal(number)
        patterns = [r"train[.]py --local_rank=", r"deepspeed[.]launcher[.]launch .*train[.]py "]
        rest = rf".*--output[ =]{re.escape(self._output)}( |$)"
        wanted = patterns[: 2 if number == signal.SIGKILL else 1]
        look = "; ".join(f"pgrep -f {shlex.quote(begin + rest)}" for begin in wanted)
        is_ours = 'test "$(readlink /proc/$pid/cwd)" = "$(pwd -P)"'  # not of a run with the same name elsewhere
        command = (
            f"cd {shlex.quote(str(Path.cwd()))} && for pid in $({look}); do {is_ours} && kill -{int(number)} $pid; done"
        )
        reached = where_it_works(hosts, f"{command}; true", PROBE_SECONDS)
        return [host for host in hosts if host in reached]

    def _ranks_here(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                is_alive = process.status() != psutil.STATUS_ZOMBIE
                if is_alive and self._is_rank(process) and is_on_this_host(process.pid):
                    found.append(process)
        return found

    def _is_rank(self, process: psutil.Process) -> bool:
        words = process.cmdline()
        is_launcher = any(Path(word).name in LAUNCHERS or word in LAUNCHER_MODULES for word in words[:4])
        is_rank = "train.py" in [Path(word).name for word in words[1:4]] and not is_launcher
        if not is_rank or flag_of(words, "--output") != self._output:
            return False
        return Path(process.cwd(), self._output).resolve() == self._run.resolve()


def is_on_this_host(pid: int) -> bool:
    """And not in a container with a network of its own, whose processes may be seen from here."""
    try:
        return Path(f"/proc/{pid}/ns/net").readlink() == Path("/proc/self/ns/net").readlink()
    except OSError:
        return True


def flag_of(words: Sequence[str], flag: str) -> str:
    """What follows the last such flag; empty where there is none."""
    given = [word.partition("=")[2] for word in words if word.startswith(f"{flag}=")]
    given += [after for word, after in pairwise(words) if word == flag]
    return given[-1] if given else ""


def say(sentence: str) -> None:
    print(f"supervisor: {sentence}", file=sys.stderr, flush=True)
