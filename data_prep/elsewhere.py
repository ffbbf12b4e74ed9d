"""Input that lies elsewhere (storage/remote.py): which files a place holds, and files here and there opened the same way.

What is known of a file before it is read, its size and time here, is there its size and a number made of its entity tag (or
version, or time): another content is another number.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from glob import has_magic
from pathlib import Path, PurePosixPath

import pyarrow as pa
from fsspec.utils import glob_translate

from data_prep.formats import DATASETS_MARKS, HIDDEN, OUR_MARKS, OURS, UNKNOWN, UNLISTED, file_format
from data_prep.records import LeftOut
from storage.remote import Remote, RemoteFile, RemoteInfo, is_remote

READ_BYTES = 1 << 20


def file_identity(path: str) -> tuple[int, int]:
    """Size and time of change (or what stands for it) of a file. Raises OSError, RemoteError."""
    if is_remote(path):
        info = Remote(path).info()
        if info is None:
            raise FileNotFoundError(2, "is gone", path)
        return _identity(info)
    stat = Path(path).stat()
    return stat.st_size, stat.st_mtime_ns


def _identity(info: RemoteInfo) -> tuple[int, int]:
    digest = hashlib.blake2b(info.version.encode(), digest_size=8).digest()
    return info.size, int.from_bytes(digest, "little") >> 1


def open_file(path: str) -> io.BufferedReader:
    """A file here or elsewhere, as bytes."""
    raw = RemoteFile(*_remote(path)) if is_remote(path) else io.FileIO(path)
    return io.BufferedReader(raw, READ_BYTES)


def open_table(path: str) -> pa.NativeFile:
    """A file here, by memory map, or elsewhere."""
    if is_remote(path):
        return pa.PythonFile(open_file(path), "r")
    return pa.memory_map(path.encode("utf-8", "surrogateescape"))  # a name need not be UTF-8


@lru_cache(1 << 10)
def _remote(url: str) -> tuple[Remote, int]:
    """A file and its size, asked once: whether it is still the same is looked at before and after it is read."""
    remote = Remote(url)
    info = remote.info()
    if info is None:
        raise FileNotFoundError(2, "is gone", url)
    return remote, info.size


def remote_files(place: str) -> Iterator[tuple[str, str, tuple[int, int], str | LeftOut]]:
    """Of each file that a place elsewhere names (a file, a folder or a pattern): its name in there, URL, what is known of
    it (as `file_identity`), and its format or why it is none. Raises ValueError where there is none."""
    fixed = place
    if has_magic(place) and not place.startswith("http"):  # where ? begins a query
        parts = place.split("/")
        fixed = "/".join(parts[: next(i for i, part in enumerate(parts) if has_magic(part))])
        matches = re.compile(glob_translate(place)).match
        found = {url: info for url, info in Remote(fixed).find().items() if matches(url)}
    else:
        remote = Remote(place)
        info = remote.info()
        if info is not None:
            last = place.rpartition("/")[2].partition("?")[0]
            verdict = file_format(last)
            if verdict is None:
                raise ValueError(f"{place} cannot be read as documents: {UNKNOWN}")
            yield last, place, _identity(info), verdict
            return
        found = remote.find()
    if not found:
        raise ValueError(f"there is no file or folder {place}")
    below = {url: PurePosixPath(url.removeprefix(fixed).lstrip("/")) for url in found}
    folders: dict[PurePosixPath, set[str]] = {}
    for name in below.values():
        folders.setdefault(name.parent, set()).add(name.name)
    ours = [folder for folder, names in folders.items() if any(marks <= names for marks in OUR_MARKS)]
    saved = {folder: _listed(fixed, folder) for folder, names in folders.items() if names >= DATASETS_MARKS}
    for url, name in below.items():
        yield str(name), url, _identity(found[url]), _verdict(url, name, found[url].size, ours, saved)


def _verdict(
    url: str, name: PurePosixPath, size: int, ours: list[PurePosixPath], saved: dict[PurePosixPath, set[str]]
) -> str | LeftOut:
    if any(name.is_relative_to(folder) for folder in ours):
        return LeftOut(url, OURS, size)
    if any(part.startswith(".") for part in name.parts):
        return LeftOut(url, HIDDEN, size)
    if name.parent in saved:
        return "arrow" if name.name in saved[name.parent] else LeftOut(url, UNLISTED, size)
    return file_format(name.name) or LeftOut(url, UNKNOWN, size)


def _listed(fixed: str, folder: PurePosixPath) -> set[str]:
    """The files of a saved `datasets` folder."""
    state = Remote(f"{fixed.rstrip('/')}/{folder / 'state.json'}")
    try:
        return {str(entry["filename"]) for entry in json.loads(state.read())["_data_files"]}
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{state.url} does not describe a saved `datasets` folder") from None
