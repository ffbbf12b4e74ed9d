"""Files that lie elsewhere, at any place that `fsspec` knows (s3://, gs://, hf://, https://), read and written as if the
connection could be lost at any moment: a range that fails is asked for again, from where the last one ended.

Keys, endpoints and the like are found as the package of each protocol finds them (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...).
"""

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import fsspec

RANGE_BYTES = 1 << 23
"""Asked for at once: what is repeated after a lost connection."""
ATTEMPTS, FIRST_WAIT_SECONDS = 6, 0.5
EXTRAS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}

Result = TypeVar("Result")


class RemoteInfo(NamedTuple):
    """What a server says of a file."""

    size: int
    version: str
    """Another after any change: the entity tag, version or time of change; empty where the server says none."""


def is_remote(place: str) -> bool:
    """Whether a place is named by a protocol, and does not lie on a file system here."""
    protocol, separator, _ = place.partition("://")
    return bool(separator) and protocol.isalnum() and protocol not in ("file", "local")


class RemoteError(ValueError):
    """A server that cannot be reached or refuses: nothing about the files there."""


class Remote:
    """A place elsewhere, a file or a folder, by its URL. Errors are RemoteErrors that name it."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        protocol = url.partition("://")[0]
        try:
            self.files, self.path = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            package = EXTRAS.get(protocol, str(error))
            raise RemoteError(
                f"{url}: {protocol}:// needs {package}, which is not installed: see requirements-storage.txt"
            ) from None
        except ValueError as error:
            raise RemoteError(f"{url}: {error}") from None

    def child(self, name: str) -> "Remote":
        """A place below."""
        below = object.__new__(Remote)
        below.url, below.files, below.path = f"{self.url}/{name}", self.files, f"{self.path.rstrip('/')}/{name}"
        return below

    def info(self) -> RemoteInfo | None:
        """Of a file; None where there is none."""

        def ask() -> RemoteInfo | None:
            self.files.invalidate_cache()
            try:
                facts = self.files.info(self.path)
            except FileNotFoundError as error:
                if (reason := _reason(error)) is not error:
                    raise reason from None
                return None
            return None if facts["type"] == "directory" else _info(facts)

        return self._insist(ask)

    def find(self) -> dict[str, RemoteInfo]:
        """All files below, or the file itself, by their URLs in the order of their names."""

        def ask() -> dict[str, RemoteInfo]:
            self.files.invalidate_cache()
            found = self.files.find(self.path, detail=True)
            return {self.files.unstrip_protocol(path): _info(facts) for path, facts in sorted(found.items())}

        return self._insist(ask)

    def read(self, begin: int = 0, end: int | None = None) -> bytes:
        """Bytes begin .. end (exclusive) in as many requests as need be."""
        if end is None:
            info = self.info()
            if info is None:
                raise RemoteError(f"there is no {self.url}")
            end = info.size
        parts = []
        while begin < end:
            behind = min(end, begin + RANGE_BYTES)
            parts.append(self._insist(lambda begin=begin, behind=behind: self._range(begin, behind)))  # type: ignore[misc]
            begin = behind
        return b"".join(parts)

    def _range(self, begin: int, end: int) -> bytes:
        data = self.files.cat_file(self.path, start=begin, end=end)
        if len(data) != end - begin:
            raise OSError(f"{len(data)} bytes came instead of {end - begin}")
        return data

    def write(self, data: bytes) -> None:
        """Replace a file; readers see the old one or the new."""
        self._insist(lambda: self.files.pipe_file(self.path, data))

    def put(self, source: Path) -> None:
        """Upload a file; readers see all of it or nothing."""
        self._insist(lambda: self.files.put_file(str(source), self.path))

    def remove(self) -> None:
        """Delete a file."""
        self._insist(lambda: self.files.rm_file(self.path))

    def _insist(self, action: Callable[[], Result]) -> Result:
        """The result of an action, which is repeated while the fault may be the connection's."""
        wait = FIRST_WAIT_SECONDS
        for attempt in range(ATTEMPTS):
            try:
                try:
                    return action()
                except FileNotFoundError as error:
                    raise _reason(error) from None
            except FileNotFoundError as error:
                raise RemoteError(f"{self.url} does not exist ({_words(error)})") from None
            except RemoteError:
                raise
            except PermissionError as error:
                raise RemoteError(f"{self.url}: no right to do this ({_words(error)}): check keys and policy") from None
            except Exception as error:  # each protocol has errors of its own
                if _status(error) in (401, 403):
                    raise RemoteError(f"{self.url}: no right to do this ({_words(error)})") from None
                if type(error).__name__ in NO_KEYS:
                    raise RemoteError(f"{self.url}: {_words(error)}") from None
                if attempt == ATTEMPTS - 1:
                    raise RemoteError(
                        f"{self.url} cannot be reached ({_words(error)}), tried {ATTEMPTS} times: run the same command again"
                    ) from None
            time.sleep(wait)
            wait *= 2
        raise AssertionError("not reached")


def _reason(error: FileNotFoundError) -> BaseException:
    """What it is about where a web server could not be asked or refused: fsspec says of any fault that there is no file."""
    cause = error.__cause__
    asked = isinstance(cause, OSError) or type(cause).__module__.startswith("aiohttp")
    if cause is None or not asked or isinstance(cause, FileNotFoundError) or _status(cause) in (404, 410):
        return error
    return cause


def _status(error: BaseException) -> int | None:
    """What a web server, or the Hub, has answered; None of anything else."""
    return getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)


NO_KEYS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError")


def _info(facts: dict[str, Any]) -> RemoteInfo:
    named = (facts.get(key) for key in ("ETag", "etag", "md5Hash", "VersionId", "blob_id", "LastModified", "mtime"))
    return RemoteInfo(int(facts["size"]), next((str(value) for value in named if value is not None), ""))


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


class RemoteFile(io.RawIOBase):
    """A remote file as a seekable stream; wrap it in a BufferedReader of the size of the ranges that are asked for."""

    def __init__(self, remote: Remote, size: int) -> None:
        self.remote, self.size, self._position = remote, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self.remote.read(self._position, min(self.size, self._position + min(len(buffer), RANGE_BYTES)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)
