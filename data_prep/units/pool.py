"""The work of a build in this process or in several; which of them does what never shows in the result."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.sharedctypes import Synchronized, SynchronizedArray
from multiprocessing.synchronize import Event
from typing import Any

from console.progress import Progress
from data_prep.encode import UnitEncoder, Work
from data_prep.ledger import Ledger
from data_prep.records import Unit

_encoder: UnitEncoder | None = None  # of a worker process
_maker: Any = None  # of a worker process that does other tasks


class Stopped(Exception):
    """The build ends early; the unit being done is dropped."""


def encode_units(work: Work, units: list[Unit], workers: int, progress: Progress) -> Iterator[Ledger]:
    """Encode the units, in any order, and yield the ledger of each when it is finished.

    The first error ends all workers; units finished by then stay finished.
    """
    if min(workers, len(units)) <= 1:
        if units:
            encoder = UnitEncoder(work, progress.advance)
            yield from map(encoder.run, units)
        return
    context = multiprocessing.get_context("spawn")
    counters, stop, started = context.Array("q", 2), context.Event(), context.Value("i", 0)
    processes = min(workers, len(units))
    pool = ProcessPoolExecutor(processes, context, _start_worker, (work, counters, stop, started))
    with _stopping(pool, stop):
        with _interrupts_later() as unseen_by_children:
            with unseen_by_children:
                pending = {pool.submit(_run_unit, unit) for unit in units}
            while started.value < processes and not any(future.done() for future in pending):
                time.sleep(0.01)
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            progress.advance(counters[0] - progress.bytes, counters[1] - progress.tokens)
            yield from _results(done)


def done_by(make: Callable[[Any], Any], job: Any, tasks: Sequence[tuple[str, Any]], workers: int) -> Iterator[Any]:
    """What the methods named in the tasks of a worker `make(job)` return for what is with their names, in the tasks' order."""
    if min(workers, len(tasks)) <= 1:
        if tasks:
            worker = make(job)
            yield from (getattr(worker, method)(given) for method, given in tasks)
        return
    processes = min(workers, len(tasks))
    context = multiprocessing.get_context("spawn")
    stop, started = context.Event(), context.Value("i", 0)
    pool = ProcessPoolExecutor(processes, context, _start_maker, (make, job, started))
    with _stopping(pool, stop):
        with _interrupts_later() as unseen_by_children:
            with unseen_by_children:
                futures = [pool.submit(_do, *task) for task in tasks]
            while started.value < processes and not any(future.done() for future in futures):
                time.sleep(0.01)
        yield from _results(futures)


def _results(futures: Iterable) -> Iterator[Any]:
    for future in futures:
        try:
            yield future.result()
        except BrokenProcessPool:
            raise ValueError(
                "a worker process died, most often because memory ran out: run the same command again, "
                "with fewer --workers if it happens again; finished units are kept"
            ) from None


@contextmanager
def _interrupts_later() -> Iterator[AbstractContextManager]:
    """Hold a Ctrl-C back until the end, when workers can be told of it in an orderly way.

    Processes that start within the yielded context never see one, not even while they import.
    """
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(True))
    try:
        yield _blocked(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    if seen:
        raise KeyboardInterrupt


@contextmanager
def _blocked(number: signal.Signals) -> Iterator[None]:
    """In this thread and in processes that it starts; another thread may still receive the signal for the process."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _stopping(pool: ProcessPoolExecutor, stop: Event) -> Iterator[None]:
    try:
        yield
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(work: Work, counters: "SynchronizedArray[int]", stop: Event, started: "Synchronized[int]") -> None:
    global _encoder
    with started.get_lock():
        started.value += 1
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_follow_parent, daemon=True).start()

    def report(new_bytes: int, new_tokens: int) -> None:
        if stop.is_set():
            raise Stopped
        with counters.get_lock():
            counters[0] += new_bytes
            counters[1] += new_tokens

    _encoder = UnitEncoder(work, report)


def _start_maker(make: Callable[[Any], Any], job: Any, started: "Synchronized[int]") -> None:
    global _maker
    with started.get_lock():
        started.value += 1
    threading.Thread(target=_follow_parent, daemon=True).start()
    _maker = make(job)


def _do(method: str, given: Any) -> Any:
    return getattr(_maker, method)(given)


def _run_unit(unit: Unit) -> Ledger:
    assert _encoder is not None
    return _encoder.run(unit)


def _follow_parent() -> None:
    """A worker must not outlive a killed parent: it would write to a folder that nobody watches."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
