"""A real S3 server (moto) on this machine, a proxy before it that cuts connections, and places in it."""

import contextlib
import socket
import threading
import urllib.request
from collections.abc import Iterator

import pytest

from tests.processes import free_port

KEYS = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """With these variables, which a new connection reads."""
    import s3fs

    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of a server with a bucket `ours`, to which s3:// leads."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", free_port(), verbose=False)
    server.start()
    address = f"http://127.0.0.1:{server._server.server_port}"
    reset = urllib.request.Request(
        f"{address}/moto-api/reset", method="POST"
    )  # another server of this process left buckets
    urllib.request.urlopen(reset).close()
    with environment(**KEYS, AWS_ENDPOINT_URL=address):
        s3fs.S3FileSystem().mkdir("ours")
        yield address
    server.stop()


def require_rights(address: str, after: int | str) -> None:
    """From so many requests on, nobody has any rights (`inf`: everybody has all)."""
    plain = {"Content-Type": "text/plain"}
    asked = urllib.request.Request(f"{address}/moto-api/reset-auth", str(after).encode(), plain)
    urllib.request.urlopen(asked).close()


class CuttingProxy:
    """Forwards to an address; the first `cuts` answers of more than `after` bytes end there, with a reset connection."""

    def __init__(self, address: str, cuts: int, after: int) -> None:
        self.upstream, self.left, self.after, self.cut = int(address.rpartition(":")[2]), cuts, after, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> "CuttingProxy":
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self.upstream))
                for pair in ((client, server, False), (server, client, True)):
                    threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, answers: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 12):
                target.sendall(data)
                passed += len(data)
                if answers and self.left > 0 and passed > self.after:
                    self.left, self.cut = self.left - 1, self.cut + 1
                    target.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    break
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
