"""Work on the units of a finished token store, in this process or in several."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any, Protocol, TypeVar

R = TypeVar("R", covariant=True)


class Worker(Protocol[R]):
    """Goes to every process, and does whole units there."""

    def run(self, unit: int) -> R:
        """What a unit gives."""


_worker: Any = None  # of a process of the pool


def of_units(worker: Worker[R], units: int, workers: int) -> Iterator[R]:
    """What each unit gives, in any order."""
    processes = min(workers, units)
    if processes <= 1:
        yield from map(worker.run, range(units))
        return
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start, (worker,))
    try:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # children inherit it: Ctrl-C is ours
        try:
            futures = [pool.submit(_run, unit) for unit in range(units)]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start(worker: Any) -> None:
    global _worker
    _worker = worker
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run(unit: int) -> Any:
    return _worker.run(unit)
