"""What asks a run to stop: a signal from a scheduler or the keyboard, or the end of the launcher that started it.

A thread of its own listens, so that a request is heard while the main thread is inside a library, in an import or in a
collective that does not return. Before the first step there is nothing to save and the process ends at once; from then on
the request is a name that the loop reads at every step.
"""

import contextlib
import os
import select
import signal
import threading
import time
from pathlib import Path

import psutil

EXIT_RUN_AGAIN = 75  # EX_TEMPFAIL of sysexits.h
EXIT_HUNG = 76
EXIT_INTERRUPTED = 130  # as a shell says of SIGINT
SAME_INTERRUPT_SECONDS = 2.0
"""A launcher may pass on a Ctrl-C that the process has had itself; a later one is another."""

REASONS = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP", "end of the launcher", "time limit")
"""Where ranks have several, the first of these counts."""

LOOK_SECONDS = 0.5
LAUNCHERS = ("deepspeed", "deepspeed.pt", "ds", "torchrun")
LAUNCHER_MODULES = (
    "deepspeed.launcher.runner",
    "deepspeed.launcher.launch",
    "torch.distributed.run",
    "torch.distributed.launch",
    "tools.supervise",
)


class StopSignal:
    """Remembers the first request; more of them change nothing, since scheduler and launcher often both send one.

    A second Ctrl-C is the exception: it ends the process at once, without a checkpoint.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._keeps_going = False
        self._interrupted_at = 0.0
        self._wakeup, writer = os.pipe()
        os.set_blocking(writer, False)
        self._numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # `nohup` asks to live on without a terminal
            self._numbers.append(signal.SIGHUP)
        for number in self._numbers:
            signal.signal(number, lambda *_: None)  # so that the number is written to the pipe, whatever is running
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        # The launchers are looked up here: one that ends before the thread has its turn would never be missed.
        threading.Thread(target=self._listen, args=(launchers(),), daemon=True).start()

    @property
    def exit_code(self) -> int:
        """What a process that was asked to stop ends with."""
        return EXIT_INTERRUPTED if self.name == "SIGINT" else EXIT_RUN_AGAIN

    def leave_to_the_loop(self) -> None:
        """From here on somebody reads `name`; until now a request ended the process."""
        self._keeps_going = True

    def _listen(self, chain: list[psutil.Process]) -> None:
        if is_orphan(chain):
            self._request("end of the launcher")
        while True:
            if select.select([self._wakeup], [], [], LOOK_SECONDS)[0]:
                for number in os.read(self._wakeup, 64):
                    if number in self._numbers:  # a library's handlers, of SIGCHLD for instance, write to the pipe too
                        self._request(signal.Signals(number).name)
            if chain and not all(_is_running(process) for process in chain):
                chain = []
                self._request("end of the launcher")

    def _request(self, name: str) -> None:
        now = time.monotonic()
        if self.name is None:
            self.name, self._interrupted_at = name, now if name == "SIGINT" else float("inf")
        elif name == "SIGINT":
            if now - self._interrupted_at > SAME_INTERRUPT_SECONDS:
                end(EXIT_INTERRUPTED, "interrupted again: the same command continues from the newest checkpoint")
            self._interrupted_at = min(self._interrupted_at, now)
        if not self._keeps_going:
            end(self.exit_code, f"stopped ({self.name}) before the first step: run the same command again")


def end(code: int, sentence: str) -> None:
    """Say it on standard error and end the process from any thread, whatever the others are doing."""
    with contextlib.suppress(OSError):
        os.write(2, f"{sentence}\n".encode())
    os._exit(code)


def launchers() -> list[psutil.Process]:
    """The processes of DeepSpeed and torch that started this one, the nearest first."""
    found = []
    for process in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()[:4]
            if any(Path(word).name in LAUNCHERS or word in LAUNCHER_MODULES for word in words):
                found.append(process)
    return found


def is_orphan(chain: list[psutil.Process]) -> bool:
    """Whether DeepSpeed's launcher on this host has lost the `deepspeed` that started it.

    On one node that is a Python process of the same process group; over ssh, which `--node_rank` shows, there is none here.
    """
    with contextlib.suppress(psutil.Error, OSError):
        words = chain[-1].cmdline() if chain else []
        if "deepspeed.launcher.launch" in words[:4] and not any(word.startswith("--node_rank") for word in words):
            parent = chain[-1].parent()
            if parent is None or os.getpgid(parent.pid) != os.getpgid(chain[-1].pid):
                return True
            return not Path(parent.cmdline()[0]).name.startswith("python")
    return False


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True
