"""Folders that prove themselves (data sets, exports, checkpoints) to a place elsewhere and back.

    URL/files.json      written first: what will be here, each file with its size and SHA-256
    URL/...             the files
    URL/manifest.json   (export.json of an export) written last: without it nothing is here, for any reader

A push that was killed continues with the files that are not there; over something else it is refused. A pull continues in
the middle of a file, compares every hash, and gives the folder its name when all of it is here.
"""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from storage.atomic import continued_folder
from storage.manifest import file_sha256
from storage.remote import RANGE_BYTES, Remote

FILES_FILE = "files.json"
FILES_AT_ONCE = 4
LISTING_VERSION = 1

Advance = Callable[[int], None]


class FileFacts(NamedTuple):
    size: int
    sha256: str


class Listing(NamedTuple):
    """What a folder holds."""

    name: str
    """Of the folder that it was."""
    kind: str
    """data, export or checkpoint."""
    last: str
    """The file that makes the rest one of this kind."""
    files: dict[str, FileFacts]

    @property
    def size(self) -> int:
        return sum(facts.size for facts in self.files.values())

    def encode(self) -> bytes:
        """The content of `files.json`."""
        return json.dumps(self._asdict() | {"version": LISTING_VERSION}, sort_keys=True, indent=1).encode()


def listing_of(folder: Path, kind: str, last: str, files: Iterable[str]) -> Listing:
    """Hashes the files of a folder."""
    facts = {name: FileFacts((folder / name).stat().st_size, file_sha256(folder / name)) for name in sorted(files)}
    return Listing(folder.resolve().name, kind, last, facts)


def read_listing(place: Remote) -> Listing:
    """What a place elsewhere holds. Raises ValueError where it is none, or not complete."""
    if (place.child(FILES_FILE)).info() is None:
        raise ValueError(f"{place.url} holds no {FILES_FILE}: nothing was pushed there, or the address is wrong")
    listing = _decode(place, place.child(FILES_FILE).read())
    if place.child(listing.last).info() is None:
        raise ValueError(f"{place.url} is not complete, it lacks {listing.last}: run the push again, it continues")
    return listing


def _decode(place: Remote, content: bytes) -> Listing:
    try:
        fields = json.loads(content)
        if fields.pop("version") != LISTING_VERSION:
            raise ValueError("another version")
        listing = Listing(**fields | {"files": {name: FileFacts(*facts) for name, facts in fields["files"].items()}})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{place.child(FILES_FILE).url} cannot be read ({error}): push again, elsewhere") from None
    for name in listing.files:
        if name.startswith("/") or ".." in Path(name).parts:
            raise ValueError(
                f"{place.child(FILES_FILE).url} names {name!r}, outside of its folder: it is not to be trusted"
            )
    return listing


def push(folder: Path, listing: Listing, place: Remote, advance: Advance, read_back: bool = False) -> bool:
    """Upload what the listing names; whether there was anything to do. `read_back`: compare the hashes of what is there."""
    sizes, guard = _begin(listing, place), threading.Lock()

    def upload(name: str) -> None:
        if sizes[name] != listing.files[name].size:
            place.child(name).put(folder / name)
        with guard:
            advance(listing.files[name].size)

    todo = any(sizes[name] != facts.size for name, facts in listing.files.items())
    _all(upload, [name for name in listing.files if name != listing.last])
    _compare(listing, place, read_back)
    upload(listing.last)
    return todo


def _begin(listing: Listing, place: Remote) -> dict[str, int | None]:
    """Say what will be there, and take away what another push left unfinished; the sizes of what is there already."""
    begun, there = place.child(FILES_FILE), place.find()
    same = False
    if begun.info() is not None:
        before = begun.read()
        if not (same := before == listing.encode()):
            old = _decode(place, before)
            if place.child(old.last).info() is not None:
                raise ValueError(f"{place.url} holds another {old.kind} already: choose another place, or remove it")
            for name in old.files:
                if _url(place, name) in there:
                    place.child(name).remove()
    elif there:
        raise ValueError(f"{place.url} holds files that no push brought there ({min(there)}): choose another place")
    if not same:
        begun.write(listing.encode())
    return {
        name: there[_url(place, name)].size if same and _url(place, name) in there else None for name in listing.files
    }


def _url(place: Remote, name: str) -> str:
    return str(place.files.unstrip_protocol(place.child(name).path))


def _compare(listing: Listing, place: Remote, read_back: bool) -> None:
    """Are the files there as they were sent? All but the last."""
    found = {url: info.size for url, info in place.find().items()}
    for name, facts in listing.files.items():
        if name == listing.last:
            continue
        remote = place.child(name)
        if found.get(_url(place, name)) != facts.size:
            raise ValueError(
                f"{remote.url} does not have the {facts.size} bytes that were sent: run the same command again"
            )
        if read_back and _sha256(remote, facts.size) != facts.sha256:
            remote.remove()
            raise ValueError(f"{remote.url} was not what was sent, and is removed: run the same command again")


def _sha256(remote: Remote, size: int) -> str:
    digest = hashlib.sha256()
    for begin in range(0, size, RANGE_BYTES):
        digest.update(remote.read(begin, min(size, begin + RANGE_BYTES)))
    return digest.hexdigest()


def pull(
    place: Remote, listing: Listing, target: Path, advance: Advance, add: Callable[[Path], None] | None = None
) -> None:
    """Download what the listing names to a folder that is there when it is whole; `add` puts more into it. Raises ValueError."""
    if target.is_symlink() or (target.exists() and not (target.is_dir() and not any(target.iterdir()))):
        raise ValueError(f"{target} is there already: choose another folder, or remove it")
    busy = f"another command is writing to {target}: wait for it or choose another folder"
    with continued_folder(target, FILES_FILE, listing.encode(), busy) as partial:
        guard = threading.Lock()

        def count(size: int) -> None:
            with guard:
                advance(size)

        _all(lambda name: fetch(place.child(name), listing.files[name], partial / name, count), listing.files)
        if add is not None:
            add(partial)
        (partial / FILES_FILE).unlink()


def fetch(remote: Remote, facts: FileFacts, path: Path, advance: Advance) -> None:
    """Download a file, from where an earlier attempt stopped; what then has another hash is fetched once more from its
    beginning. Raises ValueError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = path.stat().st_size if path.exists() else 0
    _download(remote, facts, path, min(kept, facts.size), advance)
    if file_sha256(path) == facts.sha256:
        return
    if kept:
        _download(remote, facts, path, 0, lambda _: None)
    if file_sha256(path) != facts.sha256:
        path.unlink()
        raise ValueError(f"{remote.url} is not what was pushed: its sha256 is not that of {FILES_FILE}; push it again")


def _download(remote: Remote, facts: FileFacts, path: Path, begin: int, advance: Advance) -> None:
    with path.open("ab") as file:
        file.truncate(begin)
        advance(begin)
        while begin < facts.size:
            data = remote.read(begin, min(facts.size, begin + RANGE_BYTES))
            file.write(data)
            begin += len(data)
            advance(len(data))
        file.flush()
        os.fsync(file.fileno())


def _all(action: Callable[[str], Any], names: Iterable[str]) -> None:
    """Several at once; the first error ends all that has not begun."""
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        futures = [pool.submit(action, name) for name in names]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
