"""Encoding all units of a plan on an existing Ray cluster; which node does what never shows in the result.

A unit is a task of one CPU. Ray runs it again elsewhere when its worker or its node dies; when this process dies, the same
command finds the finished units by their ledgers, as ever. Input, tokenizer and output lie on a file system that all nodes
have at the same place; the code travels with the job, and the packages that decide bytes are compared with those here.
"""

import importlib.metadata
import logging
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from console.progress import Progress
from data_prep.encode import UnitEncoder, Work
from data_prep.ledger import Ledger, read_ledger
from data_prep.records import Unit

ROOT = Path(__file__).parents[2]
CODE = "console", "storage", "data_prep"
PACKAGES = "numpy", "pyarrow", "sentencepiece", "tokenizers", "xxhash"
RETRIES = 5
TASKS_A_CPU = 2
"""Units that are handed out before the earlier ones are done, so that no worker waits."""
CONNECT_SECONDS, SEEN_SECONDS = 20.0, 60.0
"""For an answer of the cluster; for a file to show up here (NFS looks for new files now and then)."""

_encoder: UnitEncoder | None = None  # of a worker process


def encode_on_ray(
    work: Work, units: list[Unit], address: str, most: int | None, progress: Progress
) -> Iterator[Ledger]:
    """Encode the units, `most` at once, in any order, and yield the ledger of each when it is finished.

    The first error ends all; units finished by then stay finished. Raises ValueError for what keeps the cluster from it.
    """
    _connect(address)
    try:
        task = ray.remote(num_cpus=1, max_retries=RETRIES)(_run_unit)
        given, here = ray.put(work), versions(work)
        waiting, pending, sizes = iter(units), set[Any](), {unit.index: unit.size for unit in units}
        while True:
            room = most or max(1, int(TASKS_A_CPU * ray.cluster_resources().get("CPU", 0)))
            while len(pending) < room and (unit := next(waiting, None)) is not None:
                pending.add(task.remote(given, unit, here))
            if not pending:
                return
            done, rest = ray.wait(list(pending), timeout=1)
            pending = set(rest)
            for ledger in _results(done):
                _wait_for(work, ledger)
                progress.advance(sizes[ledger.unit], ledger.tokens)
                yield ledger
    finally:
        ray.shutdown()


def _connect(address: str) -> None:
    if address.startswith("ray://"):
        raise ValueError(
            f"--ray-address {address}: run this on a node of the cluster, with HOST:PORT of its head or auto"
        )
    problem = _unreachable(address)
    if problem is None:
        modules = [str(ROOT / name) for name in CODE]
        environment = {"py_modules": modules, "env_vars": {"TOKENIZERS_PARALLELISM": "false"}}
        try:
            ray.init(address, runtime_env=environment, log_to_driver=False, logging_level=logging.ERROR)
            return
        except (RayError, OSError, RuntimeError) as error:
            problem = str(error)
    raise ValueError(
        f"--ray-address {address}: no Ray cluster can be used there ({' '.join(problem.split())}): "
        "start one (`ray start --head`), or mend the address"
    )


def _unreachable(address: str) -> str | None:
    """Why nothing there answers as a cluster does; Ray itself would try for minutes, and then end the process."""
    words = [sys.executable, "-m", "ray.scripts.scripts", "health-check"]
    if address != "auto":
        words += ["--address", address]
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            return "write HOST:PORT"
        try:
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            return str(error)
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=CONNECT_SECONDS)
    except subprocess.TimeoutExpired:
        return f"what listens there gave no answer of Ray's within {CONNECT_SECONDS:.0f} s"
    return (done.stderr.strip().splitlines() or ["no answer"])[-1] if done.returncode else None


def _results(done: Iterable[Any]) -> Iterator[Ledger]:
    for reference in done:
        try:
            yield ray.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, ValueError | OSError):
                raise error.cause from None
            raise ValueError(f"a Ray worker failed: {str(error).strip().splitlines()[-1]}") from None
        except RayError as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(
                f"Ray workers died {RETRIES + 1} times over one unit of work, most often because memory ran out ({first}): "
                "run the same command again; finished units are kept"
            ) from None


def _wait_for(work: Work, ledger: Ledger) -> None:
    """Until what a node has written is seen here, too."""
    end = time.monotonic() + SEEN_SECONDS
    while read_ledger(work.folder, ledger.unit, work.plan_sha256) is None:
        if time.monotonic() > end:
            raise ValueError(f"{work.folder} is another folder on a node of the cluster: {_SHARED}")
        time.sleep(0.5)


_SHARED = "choose an --output on a file system that all nodes have at the same place"


def versions(work: Work) -> dict[str, str]:
    """Of all that decides the bytes of a unit beside the code, which is sent along."""
    packages = PACKAGES + ("transformers", "jinja2") * (work.chat is not None)
    packages += ("gigatoken", "awkward") * (work.accelerated is not None)
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def _run_unit(work: Work, unit: Unit, expected: dict[str, str]) -> Ledger:
    global _encoder
    if _encoder is None:
        node = f"node {platform.node()} of the Ray cluster"
        if not work.folder.is_dir():
            raise ValueError(f"{node} does not see {work.folder}: {_SHARED}")
        mine = versions(work)
        if different := [name for name in expected if mine[name] != expected[name]]:
            pairs = ", ".join(f"{name} {mine[name]} and not {expected[name]}" for name in different)
            raise ValueError(f"{node} has {pairs}: install the same requirements.txt on all nodes")
        _encoder = UnitEncoder(work, lambda *_: None)
    return _encoder.run(unit)
