"""Which files a source consists of, and which of those that lie beside them are no documents, with the reason.

Nothing is opened here but the list of a saved `datasets` folder: a FIFO would never return. Places elsewhere:
data_prep/elsewhere.py.
"""

import errno
import glob
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_prep.elsewhere import file_identity, remote_files
from data_prep.formats import (
    DATASETS_MARKS,
    HIDDEN,
    KNOWN,
    OUR_MARKS,
    OURS,
    UNKNOWN,
    UNLISTED,
    file_format,
)
from data_prep.records import InputFile, LeftOut, printable
from storage.remote import is_remote

CLOSED_FOLDER = "a folder that cannot be opened (what it holds cannot be counted)"
LINKS = {errno.ENOENT: "a link to nothing", errno.ELOOP: "a link that leads to itself"}
STRANGE = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}


class Source(NamedTuple):
    name: str
    weight: float | None
    places: tuple[str, ...]
    """Files, folders and globs, here or elsewhere (s3://...)."""


Found = tuple[Path, str | LeftOut]
"""A file with its format, or what is left out."""


def find_files(source: Source, on_error: str = "fail") -> tuple[list[InputFile], list[LeftOut]]:
    """Supported files of a source in the order of their names, each real file once; and what else lies there.

    `on_error`: "fail" raises ValueError at a folder or a file that cannot be opened, "skip" leaves it out; what the source
    names itself must be there.
    """
    walk = _Walk(on_error)
    chosen: dict[str, tuple[str, str, str]] = {}
    left_out: dict[str, LeftOut] = {}
    identities: dict[str, tuple[int, int]] = {}
    for place in source.places:
        if is_remote(place):
            before = len(chosen)
            for name, url, identity, verdict in remote_files(place):
                if isinstance(verdict, LeftOut):
                    left_out[url] = verdict
                else:
                    chosen.setdefault(url, (name, url, verdict))
                    identities[url] = identity
            if len(chosen) == before:
                raise ValueError(f"{place} holds no new document files (known: {KNOWN}; saved `datasets` folders)")
            continue
        matches = [place] if os.path.lexists(place) else sorted(glob.glob(place, recursive=True))  # noqa: PTH207 (absolute patterns)
        if not matches:
            raise ValueError(f"there is no file or folder {place} (source {source.name})")
        before, fixed = len(chosen), Path(place)
        if matches != [place]:
            fixed = Path(*fixed.parts[: next(i for i, part in enumerate(fixed.parts) if glob.has_magic(part))])
        here: list[LeftOut] = []
        for match in matches:
            anchor = fixed if matches != [place] else Path(match)
            look = walk.named if matches == [place] else walk.met
            for path, verdict in look(Path(match)):
                if isinstance(verdict, LeftOut):
                    here.append(verdict)
                    continue
                name = path.name if path == anchor else path.relative_to(anchor).as_posix()
                chosen.setdefault(os.path.realpath(path), (name, str(path), verdict))
        left_out |= {str(Path(entry.path).absolute()): entry for entry in here}
        if len(chosen) == before and not any(os.path.realpath(match) in chosen for match in matches):
            reasons = ", ".join(sorted({entry.reason for entry in here}))
            others = f"; what lies there is no document: {reasons}" if here else ""
            raise ValueError(f"{place} holds no new document files (known: {KNOWN}; saved `datasets` folders){others}")
    files: list[InputFile] = []
    taken: dict[str, int] = {}
    for name, file, format_ in sorted(chosen.values()):
        where = file if file in identities else str(Path(file).absolute())
        name = printable(name)
        taken[name] = taken.get(name, 0) + 1
        unique = name if taken[name] == 1 else f"{name}@{taken[name]}"
        files.append(InputFile(where, unique, format_, *(identities.get(file) or file_identity(file))))
    return files, [
        entry for path, entry in sorted(left_out.items()) if entry.files and os.path.realpath(path) not in chosen
    ]


class _Walk:
    """What lies at or below places; `on_error`: fail at what cannot be looked at, or skip it, named."""

    def __init__(self, on_error: str) -> None:
        self.on_error = on_error

    def named(self, path: Path) -> Iterator[Found]:
        """The place as it was given; if it is a file, it must be readable as documents."""
        if path.is_dir():
            try:
                os.scandir(path).close()
            except OSError as error:
                raise ValueError(f"{path} cannot be opened: {error.strerror}") from None
            yield from self.met(path)
            return
        verdict = self._judge(path)
        if isinstance(verdict, LeftOut):
            known = f" ({KNOWN})" if verdict.reason == UNKNOWN else ""
            raise ValueError(f"{path} cannot be read as documents: {verdict.reason}{known}")
        if not os.access(path, os.R_OK):
            raise ValueError(f"{path} cannot be opened: {os.strerror(errno.EACCES)}")
        yield path, verdict

    def met(self, path: Path) -> Iterator[Found]:
        """A file or a folder that a pattern matches, or that lies in another."""
        if not path.is_dir():
            yield path, self._judge(path)
            return
        visited: set[str] = set()
        closed: list[tuple[Path, LeftOut]] = []

        def note(error: OSError) -> None:
            closed.append((Path(error.filename), self._fault(Path(error.filename), CLOSED_FOLDER, error)))

        for folder, folders, names in os.walk(path, followlinks=True, onerror=note):
            if os.path.realpath(folder) in visited:
                folders.clear()
                continue
            visited.add(os.path.realpath(folder))
            found, folders[:] = self._look_into(Path(folder), folders, names)
            yield from found
        yield from closed

    def _look_into(self, folder: Path, folders: list[str], names: list[str]) -> tuple[list[Found], list[str]]:
        """What lies in a folder, and those of its folders that are to be looked into."""
        if any(marks <= {*names} for marks in OUR_MARKS):
            return [(folder, _folder_left_out(folder, OURS))], []
        if {*names} >= DATASETS_MARKS:
            return self._saved_datasets(folder, folders, names), []
        hidden = [name for name in folders if name.startswith(".")]
        found: list[Found] = [(folder / name, _folder_left_out(folder / name, HIDDEN)) for name in hidden]
        found += [(folder / name, self._judge_in_folder(folder / name)) for name in sorted(names)]
        return found, sorted({*folders} - {*hidden})

    def _saved_datasets(self, folder: Path, folders: list[str], names: list[str]) -> list[Found]:
        state = folder / "state.json"
        try:
            listed = _dataset_files(state)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            if self.on_error == "fail":
                words = "does not describe a saved `datasets` folder"
                if isinstance(error, OSError):
                    words = f"cannot be opened: {error.strerror}"
                raise ValueError(f"{state} {words}; --on-error skip leaves the folder out") from None
            fault = "cannot be opened" if isinstance(error, OSError) else "is damaged"
            reason = f"a saved `datasets` folder whose state.json {fault}"
            return [(folder, _folder_left_out(folder, reason))]
        missing = [name for name in listed if not (folder / name).is_file()]
        if missing and self.on_error == "fail":
            raise ValueError(
                f"{state} lists {missing[0]}, which is not there: restore it, or save the folder again; "
                "--on-error skip reads the others"
            )
        found: list[Found] = [(folder / name, "arrow") for name in listed if name not in missing]
        gone = [LeftOut(printable(f"{folder}/{name}"), "listed in state.json, not there", 0) for name in missing]
        found += [(folder, entry) for entry in gone]
        found += [(folder / name, _left_out(folder / name, UNLISTED)) for name in sorted({*names} - {*listed})]
        return found + [(folder / name, _folder_left_out(folder / name, UNLISTED)) for name in folders]

    def _judge_in_folder(self, path: Path) -> str | LeftOut:
        if path.name.startswith("."):
            return _left_out(path, HIDDEN)
        if path.name == "dataset_dict.json":
            return _left_out(path, "the list of a saved `datasets` folder")
        return self._judge(path)

    def _judge(self, path: Path) -> str | LeftOut:
        """The format by the file's name, or why there is none."""
        try:
            mode = path.stat().st_mode
        except OSError as error:
            if error.errno in LINKS:
                return _left_out(path, LINKS[error.errno])
            return self._fault(path, "cannot be opened", error)
        if not stat.S_ISREG(mode):
            return _left_out(path, STRANGE.get(stat.S_IFMT(mode), "a device"))
        return file_format(path.name) or _left_out(path, UNKNOWN)

    def _fault(self, path: Path, reason: str, error: OSError) -> LeftOut:
        if self.on_error == "fail":
            raise ValueError(f"{path} cannot be opened: {error.strerror}; --on-error skip leaves it out")
        return LeftOut(str(path), reason, 0)


def _left_out(path: Path, reason: str) -> LeftOut:
    try:
        facts = path.stat()
    except OSError:  # it is a link, or gone
        return LeftOut(str(path), reason, 0)
    return LeftOut(str(path), reason, facts.st_size if stat.S_ISREG(facts.st_mode) else 0)


def _folder_left_out(folder: Path, reason: str) -> LeftOut:
    closed: list[OSError] = []
    places = [Path(place, name) for place, _, names in os.walk(folder, onerror=closed.append) for name in names]
    size = sum(_left_out(path, reason).size for path in places)
    more = " (not all of it can be opened and counted)" if closed else ""
    return LeftOut(str(folder), reason + more, size, len(places) + len(closed))


def _dataset_files(state: Path) -> list[str]:
    listed = [entry["filename"] for entry in json.loads(state.read_bytes())["_data_files"]]
    return [str(Path(name)) for name in listed]
