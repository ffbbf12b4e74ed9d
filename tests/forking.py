"""The process that `tests.forks` starts: `python -m tests.forking SOCKET` is told what to fork and reports how it ended."""

import contextlib
import ctypes
import gc
import importlib
import os
import pickle
import runpy
import select
import signal
import socket
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.processes import MARK, die_with_parent
from tests.rank import assert_alone

MESSAGE_BYTES = 1 << 17
MOST_FILES = 20
NO_MARK = "0" * 32
IMPORTED = (
    "console.command",
    "data_prep.foresee",
    "deepspeed.runtime.zero.muon.original_muon",
    "engine.process_group",
    "engine.run.begin",
    "engine.run.folder",
    "engine.run.loop",
    "engine.run.memory",
    "engine.run.outputs",
    "engine.run.plan",
    "engine.run.resume",
    "launch.rank",
    "pandas",
    "pyarrow.parquet",
)
"""What train.py imports, and what takes long of that which DeepSpeed and the reader of the data do."""


def serve(connection: socket.socket) -> dict[str, Any] | None:
    """Forks for every message: the child returns with what it is to be, the parent at the end of the connection."""
    parent, running = os.getpid(), {}
    while True:
        for ready in select.select([connection, *running], [], [])[0]:
            if ready is connection:
                message, files, *_ = socket.recv_fds(connection, MESSAGE_BYTES, MOST_FILES)
                if not message:
                    return None
                job = pickle.loads(message)
                wear(job["environment"][MARK])
                reports, *files = files
                if pid := os.fork():
                    wear(NO_MARK)
                    running[os.pidfd_open(pid)] = pid, reports
                    report(reports, pid)
                    for file in files:
                        os.close(file)
                    continue
                connection.close()
                for other in [*running, reports, *(of_other for _, of_other in running.values())]:
                    os.close(other)
                be_child(parent)
                os.setsid()
                for number, file in enumerate(files[:3]):
                    os.dup2(file, number)
                    os.close(file)
                job["words"] += map(str, files[3:])
                return job
            pid, reports = running.pop(ready)
            report(reports, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            os.close(reports)
            os.close(ready)


def report(pipe: int, number: int) -> None:
    with contextlib.suppress(BrokenPipeError):  # a test that does not wait for it
        os.write(pipe, number.to_bytes(8, "little", signed=True))


def wear(mark: str) -> None:
    """Writes the mark over this process's own, where others, and forks from here on, have it."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[47]), int(fields[48])
    place = ctypes.string_at(start, end - start).index(f"{MARK}=".encode()) + len(MARK) + 1
    ctypes.memmove(start + place, mark.encode(), len(mark))


def be_child(parent: int) -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.getppid() != parent:
        os._exit(1)


def fork_ranks(count: int) -> int:
    """Returns the rank in each; the parent ends with the code of the first that fails, and ends the others."""
    parent, ranks = os.getpid(), set()
    for rank in range(count):
        if not (pid := os.fork()):
            be_child(parent)
            return rank
        ranks.add(pid)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGABRT):
        signal.signal(number, signal.SIG_IGN)  # for the ranks
    code = 0
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        if (ended := os.waitstatus_to_exitcode(status)) and not code:
            code = ended
            for other in ranks:
                os.kill(other, signal.SIGTERM)
    os._exit(code & 0xFF)  # as DeepSpeed's launcher, which hands it to sys.exit


def become(words: Sequence[str], environment: Mapping[str, str], cwd: str) -> None:
    """`python WORDS`: a file, or `-m` and a module, or `-c` and a program."""
    os.environ.clear()
    os.environ |= environment
    os.chdir(cwd)
    tempfile.tempdir = None
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    kind, what, arguments = (words[0], words[1], words[2:]) if words[0] in ("-m", "-c") else ("", words[0], words[1:])
    sys.argv = [kind if kind == "-c" else what, *arguments]
    if kind == "-m":
        sys.path[0] = cwd
        sys.modules.pop(what, None)
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.path[0] = ""
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        sys.path[0] = str(Path(what).resolve().parent)
        runpy.run_path(what, run_name="__main__")


def main() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    assert_alone()
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        job = serve(connection)
    if job is None:
        return
    words, environment = job["words"], job["environment"]
    if job["ranks"] > 1:
        rank = str(fork_ranks(job["ranks"]))
        environment |= {"RANK": rank, "LOCAL_RANK": rank}
        words = [words[0], f"--local_rank={rank}", *words[1:]]
    become(words, environment, job["cwd"])


if __name__ == "__main__":
    main()
