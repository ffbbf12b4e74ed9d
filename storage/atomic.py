"""Files that are there whole or not at all, whatever interrupts their writing."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from storage.locks import lock

LOCK_FILE = ".lock"


def own_temporary(path: Path) -> Path:
    """A name beside `path` that nobody else takes, on whatever host: several processes may be writing the same file."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:16]}.tmp")


def write_atomically(path: Path, data: bytes, temporary: Path | None = None) -> None:
    """Replace `path` by `data`: after a crash the file holds either all of the old content or all of the new."""
    temporary = temporary or path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    publish(temporary, path)


def publish(temporary: Path, path: Path) -> None:
    """Give a completely written and synced file its final name, durably."""
    temporary.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextlib.contextmanager
def finished_folder(output: Path) -> Iterator[Path]:
    """A folder to make and fill, which gets the name `output` when the context ends, or vanishes with an error."""
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        publish(partial, output)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def continued_folder(output: Path, marker: str, content: bytes, busy: str) -> Iterator[Path]:
    """A folder to fill, which gets the name `output` when the context ends. After an error it stays, for the next one whose file
    `marker` has the same content; what others left is removed. Raises ValueError with the sentence `busy` where one is at it.
    """
    partial = output.with_name(f".{output.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    try:
        held = lock(partial / LOCK_FILE)
    except BlockingIOError:
        raise ValueError(busy) from None
    with held:
        place = partial / marker
        if not (place.is_file() and place.read_bytes() == content):
            for path in partial.iterdir():
                if path.name != LOCK_FILE:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            place.parent.mkdir(exist_ok=True)
            write_atomically(place, content)
        yield partial
        (partial / LOCK_FILE).unlink()
        publish(partial, output)


@contextlib.contextmanager
def new_stream(path: Path, schema: pa.Schema) -> Iterator[pa.ipc.RecordBatchStreamWriter]:
    """Write an Arrow stream as a `new_file`."""
    with new_file(path) as file, pa.ipc.new_stream(file, schema) as stream:
        yield stream


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when it is whole and synced; after an error nothing is left."""
    temporary = own_temporary(path)
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
