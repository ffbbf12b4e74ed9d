"""On which of its hosts a run goes on, and on how many ranks of each: a layout that its recipe and JSON allow."""

import subprocess
import sys
import threading
from collections.abc import Collection
from pathlib import Path

from launch.hostfile import read_hostfile


class Slots:
    """The hosts of a hostfile with their slots; without one there are none, and a run is where its launcher puts it.

    `words`: train.py and its arguments.
    """

    def __init__(self, hostfile: Path | None, words: list[str]) -> None:
        self._words = words
        self.hosts: dict[str, int] = {}
        if hostfile:
            self.hosts, problems = read_hostfile(hostfile)
            if problems:
                raise ValueError("; ".join(problems))
        self._known: dict[int, int] = {}
        self._asking = threading.Lock()

    def foresee(self) -> None:
        """Know beforehand what can be done without one of the hosts: to ask takes as long as to notice that one is lost."""
        for without in set(self.hosts.values()):
            self._legal(sum(self.hosts.values()) - without)

    def on(self, here: Collection[str]) -> dict[str, int]:
        """How many ranks to start where: on fewer hosts the most with which the run can be continued."""
        if all(host in here for host in self.hosts):
            return self.hosts
        most = sum(self.hosts[host] for host in here)
        left, slots = self._legal(most), dict[str, int]()
        if not left:
            raise ValueError(f"no layout of the run is legal on {most} ranks, of {', '.join(here) or 'no host'}")
        for host in here:
            if taken := min(left, self.hosts[host]):
                slots[host], left = taken, left - taken
        return slots

    def gains(self, here: Collection[str], slots: dict[str, int]) -> bool:
        """Whether the run can be continued on more ranks than `slots` has."""
        most = sum(count for host, count in self.hosts.items() if host in here)
        return most == sum(self.hosts.values()) or self._legal(most) > sum(slots.values())

    def _legal(self, most: int) -> int:
        """The most ranks, of these, with which the run can be continued; asked in another process, which needs torch."""
        with self._asking:
            if most and most not in self._known:
                ask = [sys.executable, "-m", "tools.legal_ranks", str(most), "--", *self._words]
                answer = subprocess.run(ask, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True).stdout
                self._known[most] = int((answer.split() or ["0"])[-1])
            return self._known.get(most, 0)
