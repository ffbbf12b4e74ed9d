"""Real processes for tests: `run_cli` for a command as a user types it; `tests.ranks` for a function on every rank.

Every process gets an environment made from a short allow list (no RANK, WANDB_* or CUDA_* leaks in), the
CPU accelerator, one thread, and a mark by which it and all it started are found and killed: nothing outlives a test.
"""

import contextlib
import ctypes
import os
import resource
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = (
    *("console", "data_prep", "ds_configs", "engine", "launch", "model"),
    *("planner", "recipes", "storage", "tools", "train.py", "training"),
)
"""What a folder must hold for the commands to run in it."""
KEPT_VARIABLES = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "TORCH_EXTENSIONS_DIR", "USER")
MARK = "LONGFORM_TEST_PROCESS"
OUTPUT_TAIL_CHARACTERS = 6000
LIBC = ctypes.CDLL(None)
left_out = False
"""Whether a test that comes to start a process, or to send something to waiting ranks, is skipped there."""


def clean_environment(changes: Mapping[str, str | None] | None = None) -> dict[str, str]:
    """The environment of every test process; a value in `changes` replaces a variable, None removes it."""
    environment = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    environment |= {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": str(ROOT),
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "MAX_JOBS": "2",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "offline",
    }
    for name, value in (changes or {}).items():
        environment.pop(name, None)
        if value is not None:
            environment[name] = value
    return environment


def free_port() -> int:
    """A port nobody listens on, outside the range from which the kernel takes ports for outgoing connections."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def run_cli(
    command: Sequence[str | os.PathLike[str]],
    *,
    env: Mapping[str, str | None] | None = None,
    timeout: float = 120,
    cwd: str | os.PathLike[str] = ROOT,
    stdin: str = "",
    start: Callable[..., Any] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, whatever its exit code; `python`, `torchrun`, `deepspeed` are this environment's.

    Raises TimeoutError with the output and the Python stacks of everything it had started.
    """
    with tempfile.TemporaryFile("w+") as given:
        given.write(stdin)
        given.seek(0)
        with start_cli(command, env=env, cwd=cwd, stdin=given, start=start) as running:
            return running.finish(timeout)


class RunningCommand:
    """A command that `start_cli` started; its output so far can be read while it runs."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, mark: str):
        self.process, self._folder, self._mark = process, folder, mark

    @property
    def stdout(self) -> str:
        return (self._folder / "stdout").read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return (self._folder / "stderr").read_text(errors="replace")

    def send_signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill_all(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal to the command and to every process it started, as a node failure or a scheduler does."""
        _signal_marked(self._mark, number)

    def alive(self) -> int:
        """How many processes there are of the command and all that it started."""
        return _signal_marked(self._mark, 0)

    def wait_for(self, condition: Callable[[], Any], timeout: float = 120) -> Any:
        """Waits until `condition()` is true and returns its value; the command ending first is an error."""
        deadline = time.monotonic() + timeout
        while True:
            ended = self.process.poll() is not None  # read before the condition: what a last breath wrote still counts
            if value := condition():
                return value
            if ended or time.monotonic() > deadline:
                reason = f"ended with {self.process.returncode}" if ended else f"no such state after {timeout:g} s"
                raise TimeoutError(f"{reason}\n{self.stdout[-OUTPUT_TAIL_CHARACTERS:]}\n{self.stderr}")
            time.sleep(0.02)

    def finish(self, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Waits for the end."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            dump_stacks(self._mark)
            tails = self.stdout[-OUTPUT_TAIL_CHARACTERS:], self.stderr[-2 * OUTPUT_TAIL_CHARACTERS :]
            raise TimeoutError(f"{self.process.args}: no end after {timeout:g} s\n" + "\n".join(tails)) from None
        return subprocess.CompletedProcess(self.process.args, code, self.stdout, self.stderr)


@contextlib.contextmanager
def start_cli(
    command: Sequence[str | os.PathLike[str]],
    *,
    env: Mapping[str, str | None] | None = None,
    cwd: str | os.PathLike[str] = ROOT,
    stdin: Any = subprocess.DEVNULL,
    start: Callable[..., Any] | None = None,
) -> Iterator[RunningCommand]:
    """Starts a command in the background; it and all it started are gone when the `with` block ends.

    `start`: what stands in for `start_process`.
    """
    with tempfile.TemporaryDirectory(prefix="command-") as folder, marked_processes() as mark:
        paths = Path(folder) / "stdout", Path(folder) / "stderr"
        with paths[0].open("wb") as stdout, paths[1].open("wb") as stderr:
            words = [os.fspath(word) for word in command]
            variables = {**(env or {}), MARK: mark}
            process = (start or start_process)(words, variables, stdout=stdout, stderr=stderr, stdin=stdin, cwd=cwd)
        yield RunningCommand(process, Path(folder), mark)


def skip_if_left_out() -> None:
    if left_out:
        pytest.skip("starts processes: not with --fast")


def skip_before_python(event: str, arguments: tuple[Any, ...]) -> None:
    """`skip_if_left_out` as an audit hook: for tests that start an interpreter by themselves."""
    if event == "subprocess.Popen" and Path(os.fspath(arguments[1][0])).name.startswith("python"):
        skip_if_left_out()


def start_process(
    command: Sequence[str], variables: Mapping[str, str | None], **options: Any
) -> subprocess.Popen[bytes]:
    """The child leads a session of its own, so a Ctrl-C in the terminal reaches only the test, which then cleans up."""
    skip_if_left_out()
    environment = clean_environment(variables)
    options = {"cwd": ROOT, "stdin": subprocess.DEVNULL} | options
    return subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=die_with_parent, **options)


def die_with_parent() -> None:
    """What a new process does first."""
    parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2): covers a test process that is itself killed
    LIBC.prctl(parent_death_signal, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs, the test run perhaps, ignore it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@contextlib.contextmanager
def marked_processes() -> Iterator[str]:
    """Yields a fresh mark; on leaving kills every process that carries it (after a moment to end by itself)."""
    mark = secrets.token_hex(16)
    grace_seconds = 0.0
    try:
        yield mark
        grace_seconds = 2.0
    finally:
        deadline = time.monotonic() + grace_seconds
        while _signal_marked(mark, 0 if time.monotonic() < deadline else signal.SIGKILL):
            time.sleep(0.02)


def _signal_marked(mark: str, number: int) -> int:
    """Sends a signal (0: none) to the living processes with this mark and returns how many there are."""
    found = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARK) != mark or process.status() == psutil.STATUS_ZOMBIE:
                continue
            found += 1
            process.send_signal(number)
    return found


def dump_stacks(mark: str) -> None:
    """Lets Python's fault handler write the stack of every thread to stderr (the process dies of it)."""
    _signal_marked(mark, signal.SIGABRT)
    deadline = time.monotonic() + 5
    while _signal_marked(mark, 0) and time.monotonic() < deadline:
        time.sleep(0.05)
