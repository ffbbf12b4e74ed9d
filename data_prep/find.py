"""Which files a source consists of, and which of those that lie beside them are no documents, with the reason.

Nothing is opened here but the list of a saved `datasets` folder: a FIFO would never return.
"""

import errno
import glob
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_prep.formats import KNOWN, file_format
from data_prep.records import InputFile, LeftOut, printable

UNKNOWN = "none of the known suffixes"
HIDDEN = "hidden"
UNLISTED = "no data file of the saved `datasets` folder"
STRANGE = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
DATASETS_MARKS = {"state.json", "dataset_info.json"}
OUR_MARKS = ({"plan.json", ".lock"}, {"manifest.json", "dataset_dict.json"})
"""Either is in every data set that this program makes, the first also in an unfinished one."""


class Source(NamedTuple):
    name: str
    weight: float | None
    places: tuple[str, ...]
    """Files, folders and globs."""


def find_files(source: Source) -> tuple[list[InputFile], list[LeftOut]]:
    """Supported files of a source in the order of their names, each real file once; and what else lies there."""
    chosen: dict[str, tuple[str, str, str]] = {}
    left_out: dict[str, LeftOut] = {}
    for place in source.places:
        matches = [place] if os.path.lexists(place) else sorted(glob.glob(place, recursive=True))  # noqa: PTH207 (absolute patterns)
        if not matches:
            raise ValueError(f"there is no file or folder {place} (source {source.name})")
        before, fixed = len(chosen), Path(place)
        if matches != [place]:
            fixed = Path(*fixed.parts[: next(i for i, part in enumerate(fixed.parts) if glob.has_magic(part))])
        here: list[LeftOut] = []
        for match in matches:
            anchor = fixed if matches != [place] else Path(match)
            for path, verdict in _walk(Path(match), explicit=matches == [place]):
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
    for name, path, format_ in sorted(chosen.values()):
        facts = Path(path).stat()
        name = printable(name)
        taken[name] = taken.get(name, 0) + 1
        unique = name if taken[name] == 1 else f"{name}@{taken[name]}"
        files.append(InputFile(str(Path(path).absolute()), unique, format_, facts.st_size, facts.st_mtime_ns))
    return files, [
        entry for path, entry in sorted(left_out.items()) if entry.files and os.path.realpath(path) not in chosen
    ]


def _walk(path: Path, explicit: bool) -> Iterator[tuple[Path, str | LeftOut]]:
    """Every file at or below a place with its format, or why it is left out; an explicit one must have a format."""
    if not path.is_dir():
        verdict = _judge(path)
        if explicit and isinstance(verdict, LeftOut):
            known = f" ({KNOWN})" if verdict.reason == UNKNOWN else ""
            raise ValueError(f"{path} cannot be read as documents: {verdict.reason}{known}")
        if explicit and not os.access(path, os.R_OK):
            raise ValueError(f"{path} cannot be opened: {os.strerror(errno.EACCES)}")
        yield path, verdict
        return
    visited: set[str] = set()
    for folder, folders, names in os.walk(path, followlinks=True, onerror=_raise):
        if os.path.realpath(folder) in visited:
            folders.clear()
            continue
        visited.add(os.path.realpath(folder))
        here = {*names}
        if any(marks <= here for marks in OUR_MARKS):
            folders.clear()
            yield Path(folder), _folder_left_out(folder, "a data set of this program")
        elif here >= DATASETS_MARKS:
            listed = _dataset_files(Path(folder, "state.json"))
            yield from ((Path(folder, name), "arrow") for name in listed)
            yield from ((Path(folder, name), _left_out(Path(folder, name), UNLISTED)) for name in here - {*listed})
            yield from ((Path(folder, name), _folder_left_out(f"{folder}/{name}", UNLISTED)) for name in folders)
            folders.clear()
        else:
            hidden = [name for name in folders if name.startswith(".")]
            yield from ((Path(folder, name), _folder_left_out(f"{folder}/{name}", HIDDEN)) for name in hidden)
            folders[:] = sorted({*folders} - {*hidden})
            yield from ((Path(folder, name), _judge_in_folder(Path(folder, name))) for name in sorted(names))


def _raise(error: OSError) -> None:
    raise ValueError(f"{error.filename} cannot be opened: {error.strerror}")


def _judge_in_folder(path: Path) -> str | LeftOut:
    if path.name.startswith("."):
        return _left_out(path, HIDDEN)
    if path.name == "dataset_dict.json":
        return _left_out(path, "the list of a saved `datasets` folder")
    return _judge(path)


def _judge(path: Path) -> str | LeftOut:
    """The format by the file's name, or why there is none."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        reason = {errno.ENOENT: "a link to nothing", errno.ELOOP: "a link that leads to itself"}
        return _left_out(path, reason.get(error.errno, error.strerror or str(error)))
    if not stat.S_ISREG(mode):
        return _left_out(path, STRANGE.get(stat.S_IFMT(mode), "a device"))
    return file_format(path.name) or _left_out(path, UNKNOWN)


def _left_out(path: Path, reason: str) -> LeftOut:
    try:
        facts = path.stat()
    except OSError:  # it is a link, or gone
        return LeftOut(str(path), reason, 0)
    return LeftOut(str(path), reason, facts.st_size if stat.S_ISREG(facts.st_mode) else 0)


def _folder_left_out(folder: str, reason: str) -> LeftOut:
    inside = [_left_out(Path(place, name), reason) for place, _, names in os.walk(folder) for name in names]
    return LeftOut(folder, reason, sum(entry.size for entry in inside), len(inside))


def _dataset_files(state: Path) -> list[str]:
    try:
        listed = [
            entry["filename"] for entry in json.loads(state.read_bytes() if state.is_file() else b"")["_data_files"]
        ]
        missing = [name for name in listed if not (state.parent / name).is_file()]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{state} does not describe a saved `datasets` folder") from None
    if missing:
        raise ValueError(f"{state} lists {missing[0]}, which is not there: restore it, or save the folder again")
    return listed
