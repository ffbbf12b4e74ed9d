"""The ranks of `tests.ranks.Ranks`: `python -m tests.rank FOLDER PIPE...`, told on a pipe each which calls to make.

One process imports what the first call needs and is then forked into the ranks; it ends after them.
"""

import contextlib
import gc
import importlib
import os
import pickle
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.processes import die_with_parent

RENEWED_THREAD = "jemalloc_bg_thd"
"""Of the allocator that pyarrow brings, which prepares for forks and starts it anew where it is missing."""


def start(folder: Path, pipes: Sequence[int]) -> None:
    """Forks the ranks when they are told of the first call; writes with what each ended."""
    select.select(pipes[:1], [], [])
    if (call := folder / "call-1").exists():
        with contextlib.suppress(Exception, SystemExit):  # every rank meets and reports it again
            imported(pickle.loads(call.read_bytes())[0])
    assert_alone()
    parent, ranks = os.getpid(), {}
    for rank, pipe in enumerate(pipes):
        if pid := os.fork():
            ranks[pid] = rank
        else:
            be_rank(rank, parent, folder, pipe, set(pipes) - {pipe})
    for pipe in pipes:
        os.close(pipe)
    signal.signal(signal.SIGABRT, signal.SIG_IGN)  # it ends with the ranks, which write their stacks first
    for _ in pipes:
        pid, status = os.wait()
        (folder / "ending").write_text(str(os.waitstatus_to_exitcode(status)))
        (folder / "ending").rename(folder / f"ended-{ranks[pid]}")


def assert_alone() -> None:
    """No thread of this process would be missing in a fork."""
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    assert len(names) - names.count(RENEWED_THREAD) == 1, f"a fork would lose one of the threads {names}"


def be_rank(rank: int, parent: int, folder: Path, pipe: int, others: set[int]) -> None:
    """What is a rank's own: session, output and variables; never returns."""
    code = 1
    try:
        os.setsid()
        die_with_parent()
        if os.getppid() != parent:
            return
        for other in others:
            os.close(other)
        with (folder / f"output-{rank}").open("ab") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        code = serve(folder, rank, pipe)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def serve(folder: Path, rank: int, pipe: int) -> int:
    """What each rank does: makes the calls whose numbers it is told, to the end of the pipe or the first failure."""
    with os.fdopen(pipe) as numbers:
        for number in numbers:
            variables, place = dict(os.environ), Path.cwd()
            if not _answer(folder, rank, number.strip()):
                return 1
            os.environ.clear()
            os.environ |= variables
            os.chdir(place)
            gc.collect()  # the process groups of the last call, and their threads
            gc.freeze()  # what has not gone, as engines of ZeRO-3, never will
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.barrier()  # gloo aborts when one rank tears down while another still talks to it
        distributed.destroy_process_group()
    return 0


def imported(name: str) -> Callable[..., Any]:
    """The function "module:name"; what a module brings is left out of later collections of garbage."""
    module, function = name.split(":")
    if module not in sys.modules:
        importlib.import_module(module)
        gc.collect()
        gc.freeze()
    return getattr(sys.modules[module], function)


def _answer(folder: Path, rank: int, number: str) -> bool:
    """Makes one call; the report is renamed into place, so a rank killed while writing has none."""
    try:
        name, args, process_group = pickle.loads((folder / f"call-{number}").read_bytes())
        function = imported(name)
        if process_group:
            import torch.distributed

            from tests.gloo import share_device

            share_device()
            if not torch.distributed.is_initialized():
                torch.distributed.init_process_group("gloo")
        good, report = True, pickle.dumps((time.time(), True, function(*args)))
    except BaseException:
        good, report = False, pickle.dumps((time.time(), False, traceback.format_exc()))
    temporary = folder / f"writing-{number}-{rank}"
    temporary.write_bytes(report)
    temporary.rename(folder / f"report-{number}-{rank}")
    return good


if __name__ == "__main__":
    start(Path(sys.argv[1]), [int(pipe) for pipe in sys.argv[2:]])
