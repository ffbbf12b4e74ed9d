"""A build in parts, on any scheduler: each does its share of the units of work, on one file system, at once or one after another.

A share is decided by the plan alone. Units that are done stay done, whoever did them, so a part that was killed is run
again, or left to the command without --part, which does what is still missing and makes the data set.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from data_prep.plan import LOCK_FILE, WAIT, PackingPlan, make_output, unfinished
from data_prep.records import Unit
from storage.locks import lock, relock

PARTS_LOCK_FILE = f"{LOCK_FILE}-parts"


class Share(NamedTuple):
    number: int
    """From 1."""
    of: int

    def of_units(self, units: list[Unit]) -> list[Unit]:
        """Its units: about as many, and as large, as those of every other part."""
        return unfinished(units, {})[self.number - 1 :: self.of]

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


def part_from(text: str) -> Share:
    """That of `--part i/n`; raises ValueError."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"--part {text}: write I/N for part I of N, from 1/N to N/N")
    return Share(int(match[1]), int(match[2]))


@contextmanager
def joined_parts(output: Path, plan: PackingPlan, begin: Callable[[], object]) -> Iterator[None]:
    """Share the output folder with other parts of one plan, and with nobody else; whoever is alone there does `begin`."""
    make_output(output)
    with ExitStack() as stack:
        with parts_wait(output):
            try:
                try:
                    held = stack.enter_context(lock(output / LOCK_FILE))
                except BlockingIOError:
                    stack.enter_context(lock(output / LOCK_FILE, shared=True))
                    plan.refuse_another(output)
                else:
                    plan.adopt(output)
                    begin()
                    relock(held, shared=True)
            except BlockingIOError:
                raise ValueError(f"another build is writing to {output}: {WAIT}") from None
        yield


def parts_wait(output: Path) -> IO[str]:
    """While the returned one is open, other parts that begin, or change the plan's file, wait."""
    return lock(output / PARTS_LOCK_FILE, wait=True)
