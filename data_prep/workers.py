"""Encoding all units of a plan, in this process or in several; which of them does what never shows in the result."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from data_prep.encode import UnitEncoder, Work
from data_prep.progress import Progress
from data_prep.sources import Unit
from data_prep.store import Ledger

_encoder: UnitEncoder | None = None  # of a worker process


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
    counters, stop = context.Array("q", 2), context.Event()
    pool = ProcessPoolExecutor(min(workers, len(units)), context, _start_worker, (work, counters, stop))
    with _stopping(pool, stop):
        pending = {pool.submit(_run_unit, unit) for unit in units}
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            progress.advance(counters[0] - progress.bytes, counters[1] - progress.tokens)
            yield from _results(done)


def _results(futures: Iterable) -> Iterator[Ledger]:
    for future in futures:
        try:
            yield future.result()
        except BrokenProcessPool:
            raise ValueError(
                "a worker process died, most often because memory ran out: run the same command again, "
                "with fewer --workers if it happens again; finished units are kept"
            ) from None


@contextmanager
def _stopping(pool: ProcessPoolExecutor, stop) -> Iterator[None]:
    try:
        yield
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(work: Work, counters, stop) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which tells the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_follow_parent, daemon=True).start()

    def report(new_bytes: int, new_tokens: int) -> None:
        if stop.is_set():
            raise Stopped
        with counters.get_lock():
            counters[0] += new_bytes
            counters[1] += new_tokens

    _encoder = UnitEncoder(work, report)


def _run_unit(unit: Unit) -> Ledger:
    assert _encoder is not None
    return _encoder.run(unit)


def _follow_parent() -> None:
    """A worker must not outlive a killed parent: it would write to a folder that nobody watches."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
