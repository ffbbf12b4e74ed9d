"""How the ranks of a launch meet: over which network interface, and how long they wait for one another."""

import contextlib
import ipaddress
import socket
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import psutil
import torch.distributed as dist

from launch.peers import LostPeer, named

ARRIVAL = timedelta(minutes=5)
"""What may lie between the first and the last rank: slow imports from a shared file system, but no missing host."""

SILENCE = timedelta(seconds=10)
"""After this time rank 0 says whom it is waiting for."""

FAREWELL = timedelta(seconds=30)
"""For so long a rank that will not come tries to say so to the others."""

TO_READ = 1.0
"""Seconds that the first rank, who keeps the store, leaves the others to read there before it ends."""

REFUSAL = "longform/refusal"


def interface_towards(address: str, port: int, several_hosts: bool) -> str | None:
    """The network interface through which this host talks to `address`.

    None where that cannot be told, which includes a loopback address that was meant for another host too.
    """
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)  # of a datagram socket: chooses a route, sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    if several_hosts and ipaddress.ip_address(own.partition("%")[0]).is_loopback:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if own in {each.address for each in addresses}:
            return name
    return None


def wait_for_all_ranks(rank: int, world_size: int, address: str, port: int, hosts: Sequence[str]) -> dist.TCPStore:
    """Return when every rank has come here. `hosts` may name the host of every rank, for messages.

    A launcher over several hosts does not end the others when one cannot be reached or stops early; without this they
    would wait for as long as a collective may take. The process group's own store shares the port of the returned one,
    which is kept as long as the first rank lives.

    Raises LostPeer with who is missing after `ARRIVAL`, or at once with who has refused to come and why; ValueError for a
    port in use.
    """
    deadline = time.monotonic() + ARRIVAL.total_seconds()
    first, everyone = named([0], hosts), "longform/everyone"
    try:
        store = _store(rank, world_size, address, port, ARRIVAL)

        def refused() -> bool:
            return store.check([REFUSAL])

        store.set(f"longform/{rank}", "")
        if rank == 0:
            _until(
                lambda: refused() or not _missing(store, world_size),
                deadline,
                lambda: named(_missing(store, world_size), hosts),
            )
            store.set(everyone, "")
        _until(lambda: refused() or store.check([everyone]), deadline)
        if refused():
            if rank == 0:
                time.sleep(TO_READ)
            raise LostPeer(store.get(REFUSAL).decode())
    except TimeoutError:
        absent = named(_missing(store, world_size), hosts) if rank == 0 else first
        raise LostPeer(
            f"{absent} did not arrive within {ARRIVAL.total_seconds():g} s: see its messages, or check the hosts with "
            "`python -m tools.doctor --hostfile` and your hostfile"
        ) from None
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise ValueError(f"port {port} of {first} is in use: give the launcher another --master_port") from None
        raise LostPeer(f"{first} ended while {named([rank], hosts)} waited for the others: see its messages") from None
    return store


def refuse(
    rank: int, beside: range, world_size: int, address: str, port: int, hosts: Sequence[str], reason: str
) -> None:
    """Tell the ranks of other hosts, who would wait, that this one will not come, nor those `beside` it on its host, and why.

    Returns when they can know it, or after `FAREWELL`.
    """
    deadline = time.monotonic() + FAREWELL.total_seconds()
    with contextlib.suppress(TimeoutError, dist.DistError):
        store = _store(rank, world_size, address, port, FAREWELL)
        store.set(REFUSAL, f"{named([rank], hosts)} ended before the ranks had met: {reason}")
        for each in beside:
            store.set(f"longform/{each}", "")
        if rank == 0:
            _until(lambda: not _missing(store, world_size), deadline)
            time.sleep(TO_READ)


def _store(rank: int, world_size: int, address: str, port: int, patience: timedelta) -> dist.TCPStore:
    """That of the first rank. Raises TimeoutError where it does not come."""
    if rank:  # the store's own attempts print stack traces
        _until(lambda: listens(address, port), time.monotonic() + patience.total_seconds())
    return dist.TCPStore(address, port, world_size, rank == 0, patience, wait_for_workers=False, multi_tenant=True)


def _missing(store: dist.TCPStore, world_size: int) -> list[int]:
    return [rank for rank in range(world_size) if not store.check([f"longform/{rank}"])]


def listens(address: str, port: int) -> bool:
    """Whether anybody accepts a TCP connection there, within 5 seconds."""
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError:
        return False
    return True


def _until(condition: Callable[[], bool], deadline: float, whom: Callable[[], str] | None = None) -> None:
    """Wait for the condition, saying now and then for `whom`. Raises TimeoutError at the deadline."""
    pause, silent_until = 0.01, time.monotonic() + SILENCE.total_seconds()
    while not condition():
        now = time.monotonic()
        if now > deadline:
            raise TimeoutError
        if whom and now > silent_until:
            print(f"waiting for {whom()}", file=sys.stderr)
            silent_until = now + SILENCE.total_seconds()
        time.sleep(pause)
        pause = min(1.0, 1.3 * pause)
