"""Real processes for tests: `run_ranks` for a function on every rank, `run_cli` for a command as a user types it.

Every process gets an environment made from a short allow list (no RANK, WANDB_* or CUDA_* leaks in), the
CPU accelerator, one thread, and a mark by which it and all it started are found and killed: nothing outlives a test.
"""

import contextlib
import ctypes
import os
import pickle
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

ROOT = Path(__file__).resolve().parent.parent
CODE = ("console", "data_prep", "ds_configs", "engine", "launch", "model", "recipes", "tools", "train.py", "training")
"""What a folder must hold for the commands to run in it."""
KEPT_VARIABLES = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TMPDIR", "TORCH_EXTENSIONS_DIR", "USER")
MARK = "LONGFORM_TEST_PROCESS"
OUTPUT_TAIL_CHARACTERS = 6000
LIBC = ctypes.CDLL(None)


class RankError(AssertionError):
    """A rank raised, died or ran out of time; the message holds its traceback and the end of its output."""


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


def run_ranks(
    target: str | Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120,
    process_group: bool = False,
    env: Mapping[str, str | None] | None = None,
    until_all_end: bool = False,
) -> list[Any]:
    """Calls `target(*args)` once on each of `world_size` new processes and returns what they returned, by rank.

    `target` is "module:function", or a function at the top level of an importable module. With `process_group` a gloo
    group exists before the call; otherwise the target makes its own from RANK, WORLD_SIZE and MASTER_*, as `train.py`
    does. Arguments and results are pickled. `until_all_end`: do not end the others once one has failed.

    Raises RankError with the traceback of the rank that failed first, or with the stacks of all ranks after `timeout`
    seconds. No process is left behind in either case.
    """
    with Ranks(world_size, env) as ranks:
        results = ranks.call(target, *args, timeout=timeout, process_group=process_group, until_all_end=until_all_end)
        ranks.dismiss(timeout)
        return results


class Ranks:
    """Processes that wait for functions to call, one after the other; a process group stays from call to call.

    After a call that failed they cannot be called again: `alive` is False, and they end with the `with` block.
    """

    def __init__(self, world_size: int, env: Mapping[str, str | None] | None = None):
        self._context = contextlib.ExitStack()
        self._folder = Path(self._context.enter_context(tempfile.TemporaryDirectory(prefix="ranks-")))
        self._mark = self._context.enter_context(_marked_processes())
        self._processes: list[subprocess.Popen[bytes]] = []
        self._calls, self.alive = 0, True
        port = free_port()
        for rank in range(world_size):
            placement = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": world_size,
                "LOCAL_WORLD_SIZE": world_size,
                "LOCAL_SIZE": world_size,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            variables = {**{key: str(value) for key, value in placement.items()}, **(env or {}), MARK: self._mark}
            command = [sys.executable, "-m", "tests.rank", str(self._folder)]
            with self._output(rank).open("wb") as output:
                streams = {"stdin": subprocess.PIPE, "stdout": output, "stderr": subprocess.STDOUT}
                self._processes.append(_start(command, variables, **streams))

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """Ends them, and all that they started."""
        self.alive = False
        self._context.close()

    def call(
        self,
        target: str | Callable[..., Any],
        *args: Any,
        timeout: float = 120,
        process_group: bool = False,
        until_all_end: bool = False,
    ) -> list[Any]:
        """`run_ranks` on these processes."""
        assert self.alive
        self.alive = False
        name = target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"
        self._calls += 1
        (self._folder / f"call-{self._calls}").write_bytes(pickle.dumps((name, args, process_group)))
        begin = [self._output(rank).stat().st_size for rank, _ in enumerate(self._processes)]
        for process in self._processes:
            with contextlib.suppress(BrokenPipeError):  # one that ended before is seen below
                process.stdin.write(f"{self._calls}\n".encode())
                process.stdin.flush()
        deadline = time.monotonic() + timeout
        while True:
            codes = [process.poll() for process in self._processes]  # before the look for what they reported
            busy = [code is None and not self._report(rank).exists() for rank, code in enumerate(codes)]
            if not any(busy) or (any(codes) and not until_all_end):
                break
            if time.monotonic() > deadline:
                _dump_stacks(self._mark)
                raise RankError(f"{name}: no end after {timeout:g} s\n{self._said(begin)}")
            time.sleep(0.005)
        time.sleep(0.2 if any(codes) else 0)  # the other ranks may have something to say about it
        results = self._results(name, begin)
        self.alive = True
        return results

    def dismiss(self, timeout: float = 60) -> None:
        """Lets them end by themselves. Raises RankError when one does not, or with another exit code than 0."""
        self.alive = False
        for process in self._processes:
            process.stdin.close()
        deadline = time.monotonic() + timeout
        with contextlib.suppress(subprocess.TimeoutExpired):
            for process in self._processes:
                process.wait(max(0.0, deadline - time.monotonic()))
        codes = [process.poll() for process in self._processes]
        if any(codes) or None in codes:
            raise RankError(f"exit codes {codes} after the last call\n{self._said([0] * len(codes))}")

    def _results(self, name: str, begin: Sequence[int]) -> list[Any]:
        reports: dict[int, tuple[float, bool, Any]] = {}
        world_size = len(self._processes)
        for rank in range(world_size):
            if self._report(rank).exists():
                reports[rank] = pickle.loads(self._report(rank).read_bytes())
        failures = sorted((when, rank, text) for rank, (when, good, text) in reports.items() if not good)
        if failures:
            text = "\n".join(f"rank {rank} of {world_size}:\n{text}" for _, rank, text in failures)
            raise RankError(f"{name} failed\n{text}\n{self._said(begin, [rank for _, rank, _ in failures])}")
        died = [(rank, process.returncode) for rank, process in enumerate(self._processes) if process.returncode]
        if died or len(reports) < world_size:
            codes = ", ".join(f"rank {rank}: exit code {code}" for rank, code in died)
            raise RankError(f"{name}: a rank died without an exception ({codes})\n{self._said(begin)}")
        print(self._said(begin))  # pytest shows it when the test fails later
        return [reports[rank][2] for rank in range(world_size)]

    def _output(self, rank: int) -> Path:
        return self._folder / f"output-{rank}"

    def _report(self, rank: int) -> Path:
        return self._folder / f"report-{self._calls}-{rank}"

    def _said(self, begin: Sequence[int], ranks: Sequence[int] | None = None) -> str:
        """The end of what the ranks, or some of them, printed since their outputs had these sizes."""
        some = range(len(begin)) if ranks is None else ranks
        texts = [(rank, self._output(rank).read_bytes()[begin[rank] :].decode(errors="replace")) for rank in some]
        return "\n".join(f"--- output of rank {rank}\n{text[-OUTPUT_TAIL_CHARACTERS:]}" for rank, text in texts if text)


def run_cli(
    command: Sequence[str | os.PathLike[str]],
    *,
    env: Mapping[str, str | None] | None = None,
    timeout: float = 120,
    cwd: str | os.PathLike[str] = ROOT,
    stdin: str = "",
) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, whatever its exit code; `python`, `torchrun`, `deepspeed` are this environment's.

    Raises TimeoutError with the output and the Python stacks of everything it had started.
    """
    with tempfile.TemporaryFile("w+") as given:
        given.write(stdin)
        given.seek(0)
        with start_cli(command, env=env, cwd=cwd, stdin=given) as running:
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
            _dump_stacks(self._mark)
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
) -> Iterator[RunningCommand]:
    """Starts a command in the background; it and all it started are gone when the `with` block ends."""
    with tempfile.TemporaryDirectory(prefix="command-") as folder, _marked_processes() as mark:
        paths = Path(folder) / "stdout", Path(folder) / "stderr"
        with paths[0].open("wb") as stdout, paths[1].open("wb") as stderr:
            words = [os.fspath(word) for word in command]
            variables = {**(env or {}), MARK: mark}
            process = _start(words, variables, stdout=stdout, stderr=stderr, stdin=stdin, cwd=cwd)
        yield RunningCommand(process, Path(folder), mark)


def _start(command: Sequence[str], variables: Mapping[str, str | None], **options: Any) -> subprocess.Popen[bytes]:
    """The child leads a session of its own, so a Ctrl-C in the terminal reaches only the test, which then cleans up."""
    environment = clean_environment(variables)
    options = {"cwd": ROOT, "stdin": subprocess.DEVNULL} | options
    return subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_die_with_parent, **options)


def _die_with_parent() -> None:
    parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2): covers a test process that is itself killed
    LIBC.prctl(parent_death_signal, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs, the test run perhaps, ignore it
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


@contextlib.contextmanager
def _marked_processes() -> Iterator[str]:
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


def _dump_stacks(mark: str) -> None:
    """Lets Python's fault handler write the stack of every thread to stderr (the process dies of it)."""
    _signal_marked(mark, signal.SIGABRT)
    deadline = time.monotonic() + 5
    while _signal_marked(mark, 0) and time.monotonic() < deadline:
        time.sleep(0.05)
