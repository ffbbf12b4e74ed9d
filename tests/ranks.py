"""Functions of tests on every rank of a process group: in processes made for one call, or in ones that wait for the next."""

import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.forks import fixed, start_fork
from tests.processes import (
    MARK,
    OUTPUT_TAIL_CHARACTERS,
    dump_stacks,
    free_port,
    marked_processes,
    skip_if_left_out,
    start_process,
)


class RankError(AssertionError):
    """A rank raised, died or ran out of time; the message holds its traceback and the end of its output."""


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

    They are forks of one process, a fork itself if it can be one, which has imported what the first call needs. After a
    call that failed they cannot be called again: `alive` is False, and they end with the `with` block.
    """

    def __init__(self, world_size: int, env: Mapping[str, str | None] | None = None):
        self._context = contextlib.ExitStack()
        self._folder = Path(self._context.enter_context(tempfile.TemporaryDirectory(prefix="ranks-")))
        self._mark = self._context.enter_context(marked_processes())
        self._outputs = [self._folder / f"output-{rank}" for rank in (*range(world_size), "all")]
        self._calls, self.alive = 0, True
        placement = {
            "WORLD_SIZE": world_size,
            "LOCAL_WORLD_SIZE": world_size,
            "LOCAL_SIZE": world_size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(),
        }
        variables = {**{key: str(value) for key, value in placement.items()}, **(env or {}), MARK: self._mark}
        pipes = [os.pipe() for _ in range(world_size)]
        ears, self._mouths = [ear for ear, _ in pipes], [os.fdopen(mouth, "wb", buffering=0) for _, mouth in pipes]
        words = ["-m", "tests.rank", str(self._folder)]
        with contextlib.ExitStack() as opened:
            output, *_ = [opened.enter_context(file.open("wb")) for file in reversed(self._outputs)]
            options = {"stdout": output, "stderr": subprocess.STDOUT}
            if fixed(env or {}):
                command = [sys.executable, *words, *map(str, ears)]
                self._first = start_process(command, variables, **options, pass_fds=ears)
            else:
                self._first = start_fork(1, words, variables, **options, more=ears)
        for ear in ears:
            os.close(ear)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """Ends them, and all that they started."""
        self.alive = False
        self._stop_speaking()
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
        begin = [output.stat().st_size for output in self._outputs]
        for mouth in self._mouths:
            with contextlib.suppress(BrokenPipeError):  # one that ended before is seen below
                mouth.write(f"{self._calls}\n".encode())
        deadline = time.monotonic() + timeout
        while True:
            codes = self._codes()  # before the look for what they reported
            busy = [code is None and not self._report(rank).exists() for rank, code in enumerate(codes)]
            if not any(busy) or (any(codes) and not until_all_end):
                break
            if time.monotonic() > deadline:
                dump_stacks(self._mark)
                raise RankError(f"{name}: no end after {timeout:g} s\n{self._said(begin)}")
            time.sleep(0.005)
        time.sleep(0.2 if any(codes) else 0)  # the other ranks may have something to say about it
        results = self._results(name, begin)
        self.alive = True
        return results

    def dismiss(self, timeout: float = 60) -> None:
        """Lets them end by themselves. Raises RankError when one does not, or with another exit code than 0."""
        self.alive = False
        self._stop_speaking()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._first.wait(timeout)
        codes = self._codes()
        if any(codes) or None in codes:
            raise RankError(f"exit codes {codes} after the last call\n{self._said([0] * len(self._outputs))}")

    def _stop_speaking(self) -> None:
        for mouth in self._mouths:
            mouth.close()

    def _codes(self) -> list[int | None]:
        """By rank: with what it ended."""
        of_all = self._first.poll()  # before the look for what it wrote
        files = [self._folder / f"ended-{rank}" for rank, _ in enumerate(self._mouths)]
        return [int(file.read_text()) if file.exists() else of_all for file in files]

    def _results(self, name: str, begin: Sequence[int]) -> list[Any]:
        reports: dict[int, tuple[float, bool, Any]] = {}
        world_size = len(self._mouths)
        for rank in range(world_size):
            if self._report(rank).exists():
                reports[rank] = pickle.loads(self._report(rank).read_bytes())
        failures = sorted((when, rank, text) for rank, (when, good, text) in reports.items() if not good)
        if failures:
            text = "\n".join(f"rank {rank} of {world_size}:\n{text}" for _, rank, text in failures)
            raise RankError(f"{name} failed\n{text}\n{self._said(begin, [rank for _, rank, _ in failures])}")
        died = [(rank, code) for rank, code in enumerate(self._codes()) if code]
        if died or len(reports) < world_size:
            codes = ", ".join(f"rank {rank}: exit code {code}" for rank, code in died)
            raise RankError(f"{name}: a rank died without an exception ({codes})\n{self._said(begin)}")
        print(self._said(begin))  # pytest shows it when the test fails later
        return [reports[rank][2] for rank in range(world_size)]

    def _report(self, rank: int) -> Path:
        return self._folder / f"report-{self._calls}-{rank}"

    def _said(self, begin: Sequence[int], ranks: Sequence[int] | None = None) -> str:
        """The end of what the ranks, or some of them, printed since their outputs had these sizes."""
        some = range(len(begin)) if ranks is None else ranks
        names = [*(f"rank {rank}" for rank, _ in enumerate(self._mouths)), "the process before the ranks"]
        texts = [(names[i], self._outputs[i].read_bytes()[begin[i] :].decode(errors="replace")) for i in some]
        return "\n".join(f"--- output of {name}\n{text[-OUTPUT_TAIL_CHARACTERS:]}" for name, text in texts if text)


class RankPool:
    """Ranks that wait between the calls of a test run: some for each world size, others in their place after a failure."""

    def __init__(self):
        self._waiting: dict[int, Ranks] = {}

    def __enter__(self) -> "RankPool":
        return self

    def __exit__(self, *_: object) -> None:
        for ranks in self._waiting.values():
            ranks.kill()

    def call(self, world_size: int, target: str | Callable[..., Any], *args: Any, timeout: float = 400) -> list[Any]:
        """`run_ranks(target, world_size, *args)` on processes that may have answered calls before."""
        skip_if_left_out()
        if world_size not in self._waiting:
            self._waiting[world_size] = Ranks(world_size)
        ranks = self._waiting[world_size]
        try:
            return ranks.call(target, *args, timeout=timeout)
        finally:
            if not ranks.alive:
                self._waiting.pop(world_size).kill()

    def dismiss(self) -> None:
        """Lets all end by themselves, as `Ranks.dismiss`."""
        for ranks in self._waiting.values():
            ranks.dismiss()
