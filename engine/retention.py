"""Which checkpoints a run keeps: nothing good goes for the sake of something that is not.

`keep_last` counts checkpoints that are intact, byte by byte, and were made while steps were applied. A damaged, renamed or
foreign folder neither counts nor is deleted. A checkpoint of skipped steps (the run may be diverging) does not count, and
goes as soon as a newer checkpoint is there.
"""

import contextlib
import shutil
from pathlib import Path

from engine.checkpoint_manifest import folder_of, read_manifest, step_of, steps
from training.config import CheckpointConfig

_proven: dict[Path, tuple] = {}
"""Checkpoints that this process wrote or has read whole, with the identity their files had then."""


def retire(run: Path, written: Path, policy: CheckpointConfig) -> None:
    """Delete what the policy no longer keeps, now that the checkpoint `written` is complete. It itself always stays."""
    _proven[written] = _identity(written)
    skipping = {}  # newest first: whether it was saved while steps were skipped
    for folder in steps(run):
        with contextlib.suppress(ValueError):  # damaged or not what its name says: left for its owner to look at
            skipping[folder] = read_manifest(folder, full=False).state.consecutive_skipped_steps > 0
    places = policy.keep_last - (not skipping.pop(written))
    crowded = list(skipping.values()).count(False) > places  # else nothing that counts goes, and nothing need be read
    for folder, was_skipping in skipping.items():
        lasting = policy.keep_every_steps and step_of(folder) % policy.keep_every_steps == 0
        if was_skipping:
            _delete(folder)
        elif crowded and places:
            places -= _is_intact(folder)
        elif crowded and not lasting:
            _delete(folder)


def _is_intact(folder: Path) -> bool:
    """Whether every byte is as it was written; files that did not change are read once a process."""
    if (identity := _identity(folder)) != _proven.get(folder):
        try:
            read_manifest(folder)
        except ValueError:
            return False
        _proven[folder] = identity
    return True


def _identity(folder: Path) -> tuple:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple((path, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path in files for s in [path.stat()])


def _delete(folder: Path) -> None:
    doomed = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def set_aside(run: Path, step: int) -> list[Path]:
    """Move the checkpoints after `step` out of the way, to RUN/set_aside, and return where they are now.

    Raises ValueError, and moves nothing, unless there is an intact checkpoint of `step`.
    """
    read_manifest(folder_of(run, step))
    moved = []
    for later in [folder for folder in steps(run) if step_of(folder) > step]:
        target, number = run / "set_aside" / later.name, 1
        while target.exists():
            number += 1
            target = target.with_name(f"{later.name}.{number}")
        target.parent.mkdir(exist_ok=True)
        later.rename(target)
        moved.append(target)
    return moved
