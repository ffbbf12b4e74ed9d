"""The connections of this process to other hosts, and how it notices that one of these hosts is gone.

A host that loses its power or its network closes no connection: whoever waits for it in a collective waits until the
collective times out, and whoever sends to it some 15 minutes. So the kernel is told to ask the other side of every
connection whether it is still there (RFC 1122, 4.2.3.6; RFC 5482), which costs the ranks nothing.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator

import psutil

SILENCE_SECONDS = 20
"""A network may fail for this long and come back; after it, the other side counts as lost."""

ASK_SECONDS = 5
"""How often a silent connection is asked, and how often new connections are looked for."""


def connections() -> Iterator[tuple[socket.socket, set[int]]]:
    """This process's established TCP connections, each with the ports of its ends; valid until the next is taken."""
    for found in psutil.Process().net_connections("tcp"):
        if found.status == psutil.CONN_ESTABLISHED:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(found.fd)) as ours:
                yield ours, {end.port for end in (found.laddr, found.raddr) if end}


def watch_links() -> None:
    """From here on a collective fails within about `SILENCE_SECONDS` of losing a host. Groups are made at any time."""

    def watch() -> None:
        while True:
            with contextlib.suppress(psutil.Error, OSError):
                for connection, _ in connections():
                    _ask(connection)
            time.sleep(ASK_SECONDS)

    threading.Thread(target=watch, daemon=True, name="watch_links").start()


def _ask(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed meanwhile
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (
            (socket.TCP_KEEPIDLE, ASK_SECONDS),
            (socket.TCP_KEEPINTVL, ASK_SECONDS),
            (socket.TCP_USER_TIMEOUT, 1000 * SILENCE_SECONDS),  # of unanswered questions and of data without receipt
        ):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
