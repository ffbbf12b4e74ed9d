"""Which checkpoints a run keeps: nothing good goes for the sake of something that is not.

`keep_last` counts checkpoints that are intact, byte by byte, and were made while steps were applied. A damaged, renamed or
foreign folder neither counts nor is deleted. A checkpoint of skipped steps (the run may be diverging) does not count, and
goes as soon as a newer checkpoint is there.
"""

import contextlib
import shutil
from pathlib import Path

from engine.checkpoint.manifest import FindChange, find_change, folder_of, read_manifest, step_of, steps
from training.config import CheckpointConfig


class Retention:
    """The checkpoints of a run as this process knows them; one for the life of a training."""

    def __init__(self, run: Path, policy: CheckpointConfig) -> None:
        self._run, self._policy = run, policy
        self._there = set(steps(run))
        self._proven: dict[Path, tuple] = {}
        """Those that this process wrote or has read whole, with the identity their files had then."""

    def retire(self, written: Path) -> list[str]:
        """Delete what the policy no longer keeps, now that the checkpoint `written` is complete. It itself always stays.

        Returns a sentence for each that could not be deleted, and for those that somebody else took away: neither is a
        reason to end a run.
        """
        policy, self._proven[written] = self._policy, _identity(written)
        seen = steps(self._run)
        notices = self._missing({written, *self._there} - set(seen))
        self._there = set(seen)
        skipping = {}  # newest first: whether it was saved while steps were skipped
        for folder in seen:
            with contextlib.suppress(ValueError):  # damaged or not what its name says: left for its owner to look at
                skipping[folder] = read_manifest(folder, full=False).state.consecutive_skipped_steps > 0
        places = policy.keep_last - (not skipping.pop(written, False))
        crowded = (
            list(skipping.values()).count(False) > places
        )  # else nothing that counts goes, and nothing need be read
        for folder, was_skipping in skipping.items():
            lasting = policy.keep_every_steps and (step_of(folder) or 0) % policy.keep_every_steps == 0
            if crowded and places and not was_skipping:
                places -= self._is_intact(folder)
            elif was_skipping or (crowded and not lasting):
                notices += delete_folder(folder)
                self._there.discard(folder)
        return notices

    def _missing(self, folders: set[Path]) -> list[str]:
        gone = sorted(folder.name for folder in folders)
        place = self._run / "checkpoints"
        return [f"{place}: {', '.join(gone)} was removed while training ran, by something else"] if gone else []

    def _is_intact(self, folder: Path) -> bool:
        """Whether every byte is as it was written; files that did not change are read once."""
        if (identity := _identity(folder)) != self._proven.get(folder):
            try:
                read_manifest(folder)
            except ValueError:
                return False
            self._proven[folder] = identity
        return True


def _identity(folder: Path) -> tuple:
    files = []
    with contextlib.suppress(FileNotFoundError):  # taken away meanwhile
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            s = path.stat()
            files.append((path, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns))
    return tuple(files)


def delete_folder(folder: Path) -> list[str]:
    """Delete a checkpoint, or what a killed save or deletion left of one; a sentence where the file system refuses."""
    doomed = folder
    try:
        if not folder.name.startswith("."):  # it ceases to be a checkpoint in one step
            doomed = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(doomed, ignore_errors=True)
            folder.rename(doomed)
        shutil.rmtree(doomed)
    except FileNotFoundError:  # somebody else was faster
        shutil.rmtree(doomed, ignore_errors=True)
    except OSError as error:
        return [f"{folder} is no longer needed but cannot be deleted ({error.strerror}): delete it yourself"]
    return []


def set_aside(run: Path, step: int, find_change: FindChange = find_change) -> list[Path]:
    """Move the checkpoints after `step` out of the way, to RUN/set_aside, and return where they are now.

    Raises ValueError, and moves nothing, unless there is an intact checkpoint of `step`.
    """
    read_manifest(folder_of(run, step), find_change=find_change)
    moved = []
    for later in [folder for folder in steps(run) if (step_of(folder) or 0) > step]:
        target, number = run / "set_aside" / later.name, 1
        while target.exists():
            number += 1
            target = target.with_name(f"{later.name}.{number}")
        target.parent.mkdir(exist_ok=True)
        later.rename(target)
        moved.append(target)
    return moved
