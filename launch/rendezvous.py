"""How the ranks of a launch meet: over which network interface, and how long they wait for one another."""

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

    Raises LostPeer with who is missing after `ARRIVAL`, ValueError for a port in use.
    """
    deadline = time.monotonic() + ARRIVAL.total_seconds()
    first, everyone = named([0], hosts), "longform/everyone"
    try:
        if rank:
            _until(lambda: listens(address, port), deadline)  # the store's own attempts print stack traces
        store = dist.TCPStore(address, port, world_size, rank == 0, ARRIVAL, wait_for_workers=False, multi_tenant=True)
        store.set(f"longform/{rank}", "")
        if rank == 0:
            _until(lambda: not _missing(store, world_size), deadline, lambda: named(_missing(store, world_size), hosts))
            store.set(everyone, "")
        _until(lambda: store.check([everyone]), deadline)
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
