"""How long each rank works for a step, without its waits for the others, and who is slower than the rest.

Work is what a rank does by itself: waiting for its samples and the forward passes of its layers. On a CPU that is the time in
which its thread ran or waited for a core; on a GPU the time between two events on its stream, which has the waits of those
layouts in it that communicate in a forward pass (ZeRO-3, tensor and sequence parallel), where all ranks are as slow as one.
"""

import contextlib
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from engine.engine import Engine
from launch.rank import PRESENT

SLOW = 1.3
"""Times the median of the ranks that hold the same layers."""
STEPS_IN_A_ROW = 20
SCHEDULED = Path("/proc/thread-self/schedstat")


class Pace:
    """This rank's work, and what is known of the others'."""

    def __init__(self, engine: Engine) -> None:
        self._mesh, self._on_gpu = engine.mesh, engine.device.type == "cuda"
        self._seconds, self._began = 0.0, 0.0
        self._events: list[torch.cuda.Event] = []
        self._is_told = True
        self._slow = [0] * engine.mesh.world_size
        self._roles = [engine.mesh._replace(rank=rank).pipeline_rank for rank in range(engine.mesh.world_size)]
        engine.module.register_forward_pre_hook(self._before)
        engine.module.register_forward_hook(self._after, always_call=True)

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """A step begins in here."""
        self._events, self._is_told, began = [], False, time.perf_counter()
        yield
        self._seconds = time.perf_counter() - began

    def _before(self, *_: Any) -> None:
        self._began = self._now()

    def _after(self, *_: Any) -> None:
        self._seconds += self._now() - self._began

    def _now(self) -> float:
        if self._on_gpu:
            self._events.append(torch.cuda.Event(enable_timing=True))
            self._events[-1].record()
            return 0.0
        try:
            ran, waited, _ = SCHEDULED.read_text().split()
        except (OSError, ValueError):
            return time.thread_time()
        return (int(ran) + int(waited)) / 1e9

    def of_ranks(self) -> list[float]:
        """This rank's work in its place among zeros, once a step."""
        seconds = [0.0] * self._mesh.world_size
        if not self._is_told:
            pairs = zip(self._events[::2], self._events[1::2], strict=False)
            of_events = sum(first.elapsed_time(second) for first, second in pairs if second.query()) / 1000
            seconds[self._mesh.rank], self._is_told = self._seconds + of_events, True
        return seconds

    def slow(self, seconds: list[float]) -> list[str]:
        """Given the work of all ranks, a sentence for each that has been slow for so many steps in a row by now."""
        sentences = []
        for rank, own in enumerate(seconds if all(seconds) else []):
            usual = statistics.median_low(
                [each for each, role in zip(seconds, self._roles, strict=True) if role == self._roles[rank]]
            )
            self._slow[rank] = self._slow[rank] + 1 if own > SLOW * usual else 0
            if self._slow[rank] == STEPS_IN_A_ROW:
                name = PRESENT[0].named([rank]) if PRESENT else f"rank {rank}"
                sentences.append(
                    f"{name} is slow: in {STEPS_IN_A_ROW} steps in a row it worked more than {SLOW} times as long as the "
                    f"median rank, in the last {own:.3g} s where {usual:.3g} s are usual"
                )
        return sentences
