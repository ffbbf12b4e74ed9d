"""A data set of which only a part is here: shards come from object storage when a row of them is first read.

    DATA/on_demand.json   where the shards are, their sizes and hashes, and how many bytes of them may lie here
    DATA/...              all files of the data set but its shards and its token store
    DATA/<split>/shard-*  the shards that were read last

Any number of processes may read. One at a time brings a shard (continuing where a killed process stopped, compared with its
hash before it gets its name), after it has taken away what was used longest ago where there would be too much. A process
that still reads a shard that is taken away reads on, since it is mapped, until it turns to others.
"""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from storage.atomic import publish, write_atomically
from storage.locks import lock
from storage.manifest import MANIFEST_FILE, Manifest
from storage.remote import Remote
from storage.transfer import FileFacts, Listing, fetch, pull

ON_DEMAND_FILE, TOKENS = "on_demand.json", "tokens/"
CACHE_LOCK = ".on_demand.lock"
Result = TypeVar("Result")


class OnDemand(NamedTuple):
    """The shards of a folder, and where they are."""

    folder: Path
    url: str
    limit: int
    """Bytes of shards that may lie here."""
    shards: dict[str, FileFacts]

    def use(self, file: str, action: Callable[[], Result]) -> Result:
        """The result of an action on a shard that is here, whole; it may raise FileNotFoundError, and is then tried again.

        Raises ValueError where the shard cannot be brought.
        """
        path = self.folder / file
        try:
            result = action()
        except FileNotFoundError:
            with lock(self.folder / CACHE_LOCK, wait=True):
                if not path.exists():
                    self._bring(path, file)
                return action()
        with contextlib.suppress(FileNotFoundError):
            os.utime(path)
        return result

    def _bring(self, path: Path, file: str) -> None:
        facts, partial = self.shards[file], path.with_name(f".{path.name}.partial")
        self._make_room(facts.size, path)
        fetch(Remote(self.url).child(file), facts, partial, lambda size: None)
        publish(partial, path)

    def _make_room(self, size: int, wanted: Path) -> None:
        """Take shards away, and what killed processes left of others, those first that were brought or opened longest ago."""
        found = []
        for file in self.shards:
            path = self.folder / file
            for there in (path, path.with_name(f".{path.name}.partial")):
                if path != wanted and there.exists():
                    found.append((there.stat().st_mtime_ns, there.stat().st_size, there))
        total = size + sum(bytes_there for _, bytes_there, _ in found)
        for _, bytes_there, there in sorted(found):
            if total > self.limit:
                there.unlink()
                total -= bytes_there


def on_demand(folder: Path) -> OnDemand | None:
    """Of a data set; None where all of it is here. Raises ValueError."""
    try:
        fields = json.loads((folder / ON_DEMAND_FILE).read_bytes())
        shards = {file: FileFacts(*facts) for file, facts in fields["shards"].items()}
        return OnDemand(folder, fields["url"], fields["limit"], shards)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / ON_DEMAND_FILE} cannot be read ({error}): pull the data set again") from None


def pull_on_demand(place: Remote, listing: Listing, target: Path, limit: int) -> None:
    """Make a folder whose shards come when they are read. Raises ValueError."""
    if listing.kind != "data set":
        raise ValueError(f"{place.url} is no data set but {listing.kind}: only the shards of a data set come on demand")
    manifest = Manifest.model_validate_json(place.child(MANIFEST_FILE).read())
    entries = (entry for sources in manifest.splits.values() for entry in sources.values())
    shards = {shard.file: FileFacts(shard.bytes, shard.sha256) for entry in entries for shard in entry.shards}
    largest = max((facts.size for facts in shards.values()), default=0)
    if limit < 2 * largest:
        raise ValueError(f"--on-demand {limit:,}: at least two shards must fit, {2 * largest:,} bytes")
    here = {n: f for n, f in listing.files.items() if n not in shards and not n.startswith(TOKENS)}
    words = {"url": place.url, "limit": limit, "shards": shards}

    def note(folder: Path) -> None:
        for file in shards:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / ON_DEMAND_FILE, json.dumps(words).encode())

    pull(place, listing._replace(files=here), target, lambda size: None, note)
