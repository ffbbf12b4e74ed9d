"""Why a collective failed: every rank leaves its last words in the store, and the others read them.

A rank that fails says so and why; one that is killed says nothing. Whoever notices it in a collective registers too, looks
at the processes of its own host, and names who ended with what, or who is missing.
"""

import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Callable, Sequence

import psutil
import torch.distributed as dist

from launch.links import connections

FAILED_COLLECTIVE = re.compile(
    r"Read error \S+ Connection reset by peer|Connection closed by peer \S+[^\s.]|Connection reset by peer"
    r"|[Cc]onnection closed|Broken pipe|[Tt]imed out waiting|No route to host|Connection refused|Connection timed out"
    r"|wait timeout after|NCCL .*remote process exited"
)
"""What gloo and NCCL say when another rank does not take part; in the middle of longer texts."""

READ_SECONDS = 10.0
FAREWELL_SECONDS = 3.0
SIGNALS_FIRST_SECONDS = 1.5
"""Where a signal ended the others, this process has it too, or is about to: then that is the reason."""

WORDS = "longform/words"


class LostPeer(RuntimeError):
    """Another rank ended, hangs or cannot be reached; the sentence says which."""


class RollCall:
    """The ranks of this launch and their last words, in a store that the first rank (or torchrun) keeps."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, port: int, reachable: Callable[[], bool]) -> None:
        """`port`: the store's; `reachable`: whether its keeper still listens. To be made before the process group."""
        self.store, self.rank, self.world_size, self._reachable = store, rank, world_size, reachable
        self._port = port
        self.exit_code = 1
        """Of a rank that ends because another does not take part."""
        self._places: list[tuple[str, int]] = []
        store.set(f"longform/place/{rank}", f"{socket.gethostname()} {os.getpid()}")
        if rank == 0:
            store.set(WORDS, "")

    def read_places(self) -> None:
        """Learn host and process of every rank, once all are there."""
        for text in self.store.multi_get([f"longform/place/{rank}" for rank in range(self.world_size)]):
            host, pid = text.decode().split()
            self._places.append((host, int(pid)))

    def named(self, ranks: list[int]) -> str:
        return named(ranks, [host for host, _ in self._places])

    def say(self, text: str) -> None:
        """Leave this rank's last words; the first rank then waits a moment, while its store can still be read."""
        with contextlib.suppress(RuntimeError, psutil.Error):
            self._write(self.rank, text)
            if self.rank == 0:
                _break_connections(self._port)
                time.sleep(FAREWELL_SECONDS)

    def explain(self, error: str) -> str:
        """The sentence for a collective that failed with this error."""
        kind = "timed out" if re.search("imed out waiting|wait timeout", error) else "failed"
        try:
            return f"a collective {kind}: {self._find_cause()}"
        except RuntimeError:
            return f"a collective {kind}: {self.named([0])} ended or cannot be reached: see its messages"

    def _find_cause(self) -> str:
        time.sleep(SIGNALS_FIRST_SECONDS)
        self._check_store()
        self._write(self.rank, None)
        deadline = time.monotonic() + READ_SECONDS
        while True:
            self._check_store()
            words = self._read()
            if causes := [(rank, text) for rank, text in words if text]:
                rank, text = causes[0]
                if self.rank == 0:
                    time.sleep(1.0)  # for the others, who read the same store
                return f"{self.named([rank])} {text}"
            silent = sorted(set(range(self.world_size)) - {rank for rank, _ in words})
            for rank in silent:
                if state := self.state_here(rank):
                    self._write(rank, state)
            if time.monotonic() > deadline:
                if not silent:
                    return "no rank said why: see the messages of all"
                has = "has" if len(silent) == 1 else "have"
                return f"{self.named(silent)} {has} not arrived there and said nothing: killed, stopped, hanging or cut off"
            time.sleep(0.5)

    def state_here(self, rank: int) -> str | None:
        """What is wrong with the process of a rank on this very host, if that can be seen."""
        host, pid = self._places[rank]
        if host != socket.gethostname():
            return None
        try:
            status = psutil.Process(pid).status()
        except psutil.Error:
            status = psutil.STATUS_ZOMBIE
        if status == psutil.STATUS_ZOMBIE:
            return "was killed, for memory perhaps: it said nothing and its process is gone"
        return "is stopped (SIGSTOP): its process does not run" if status == psutil.STATUS_STOPPED else None

    def _write(self, rank: int, text: str | None) -> None:
        line = json.dumps([rank, text]) + "\n"
        self.store.append(WORDS, line)  # type: ignore[attr-defined]  # torch's stubs leave it out

    def _read(self) -> list[tuple[int, str | None]]:
        return [tuple(json.loads(line)) for line in self.store.get(WORDS).decode().splitlines()]

    def _check_store(self) -> None:
        if self.rank and not self._reachable():
            raise RuntimeError("the store is gone")


def _break_connections(store_port: int) -> None:
    """So that the others, who wait in a collective, notice while the store still stands."""
    for connection, ports in connections():
        if store_port not in ports:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """`node2 (ranks 8, 9)`; hosts beyond the fourth are counted."""
    places: dict[str | None, list[int]] = {}
    for rank in ranks:
        places.setdefault(hosts[rank] if rank < len(hosts) else None, []).append(rank)
    texts = []
    for host, of_host in list(places.items())[:4]:
        shown = ", ".join(map(str, of_host[:8])) + (" ..." if len(of_host) > 8 else "")
        words = f"rank{'s' if len(of_host) > 1 else ''} {shown}"
        texts.append(f"{host} ({words})" if host else words)
    return ", ".join(texts) + (f" and {len(places) - 4} more hosts" if len(places) > 4 else "")
