"""Python commands without the seconds of their imports: `run_python(["train.py", ...], ranks=2)`.

They run in forks of one process, which has imported torch, DeepSpeed and the engine: with the output, the exit code, the
session and the mark that `tests.processes` gives a command. What starts the ranks of a user's run is not here: tests of a
launcher, of imports, or of memory from the first byte on take `run_cli`.
"""

import contextlib
import functools
import os
import pickle
import select
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tests.forking import MESSAGE_BYTES, MOST_FILES, NO_MARK
from tests.processes import (
    MARK,
    ROOT,
    RunningCommand,
    clean_environment,
    free_port,
    run_cli,
    skip_if_left_out,
    start_cli,
    start_process,
)

FIXED = ("PYTHON", "DS_ACCELERATOR", "OMP_", "MALLOC_", "LD_", "HF_", "CUDA_", "TORCH")
"""Beginnings of the variables that are read while Python starts or imports."""


class Fork:
    """What `subprocess.Popen` is for another program."""

    def __init__(self, words: Sequence[str], reports: int):
        self.args, self.returncode = words, None
        self._reports = os.fdopen(reports, "rb", buffering=0)
        self.pid = self._next()

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._reports], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = self._next()
            self._reports.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _next(self) -> int:
        report = self._reports.read(8)
        assert report, "the process that forks has ended: see what it said"
        return int.from_bytes(report, "little", signed=True)


@functools.cache
def forking_process() -> socket.socket:
    """Starts it once in a test run; it ends when the other end of its socket is closed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-m", "tests.forking", str(theirs.fileno())]
        start_process(command, {MARK: NO_MARK}, pass_fds=[theirs.fileno()])
    return ours


def fixed(variables: Iterable[str]) -> bool:
    """Whether some of them are read so early that a fork comes too late."""
    return any(name.startswith(FIXED) for name in variables)


def start_fork(
    ranks: int,
    words: Sequence[str],
    variables: Mapping[str, str | None],
    *,
    stdout: Any,
    stderr: Any,
    stdin: Any = subprocess.DEVNULL,
    cwd: Any = ROOT,
    more: Sequence[int] = (),
) -> Fork:
    """`start_process` of `python WORDS`; the numbers that it has for `more` open files are added to the words."""
    skip_if_left_out()
    assert not fixed(variables), "these have been read: take run_cli"
    if ranks > 1:
        placement = {"WORLD_SIZE": ranks, "LOCAL_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        variables = {name: str(value) for name, value in placement.items()} | dict(variables)
    reports, writer = os.pipe()
    with contextlib.ExitStack() as opened:
        opened.callback(os.close, writer)
        if stdin == subprocess.DEVNULL:
            stdin = opened.enter_context(open(os.devnull, "rb"))  # noqa: PTH123
        if stderr == subprocess.STDOUT:
            stderr = stdout
        files = [writer, *(file.fileno() for file in (stdin, stdout, stderr)), *more]
        job = {"words": words, "ranks": ranks, "environment": clean_environment(variables), "cwd": os.fspath(cwd)}
        message = pickle.dumps(job)
        assert len(message) < MESSAGE_BYTES
        assert len(files) <= MOST_FILES
        socket.send_fds(forking_process(), [message], files)
    return Fork(words, reports)


def run_python(
    words: Sequence[str | os.PathLike[str]], ranks: int = 1, **options: Any
) -> subprocess.CompletedProcess[str]:
    """`run_cli(["python", *words])`; with more ranks than one, as a launcher's ranks, the first that fails ends them all."""
    return run_cli(words, start=functools.partial(start_fork, ranks), **options)


def start_python(
    words: Sequence[str | os.PathLike[str]], ranks: int = 1, **options: Any
) -> contextlib.AbstractContextManager[RunningCommand]:
    """`start_cli(["python", *words])`; its process is the parent of the ranks, which `kill_all` reaches."""
    return start_cli(words, start=functools.partial(start_fork, ranks), **options)
