"""Which checkpoints a run keeps: nothing good goes for the sake of something that is not.

`keep_last` counts checkpoints that are intact, byte by byte, and were made while steps were applied. A damaged, renamed or
foreign folder neither counts nor is deleted. A checkpoint of skipped steps (the run may be diverging) does not count, and
goes as soon as a newer checkpoint is there.
"""

import shutil
from pathlib import Path

from engine.checkpoint_manifest import read_manifest, step_of, steps
from training.config import CheckpointConfig

_proven: dict[Path, tuple] = {}
"""Checkpoints that this process wrote or has read whole, with the identity their files had then."""


def retire(run: Path, written: Path, policy: CheckpointConfig) -> None:
    """Delete what the policy no longer keeps, now that the checkpoint `written` is complete. It itself always stays."""
    state = read_manifest(written, full=False).state
    _proven[written] = _identity(written)
    kept = 0 if state.consecutive_skipped_steps else 1
    for folder in steps(run):
        if folder == written:
            continue
        try:
            manifest = read_manifest(folder, full=False)
            while_skipping = manifest.state.consecutive_skipped_steps > 0
            if kept < policy.keep_last and not while_skipping:
                _prove(folder)
                kept += 1
                continue
        except ValueError:
            continue  # damaged or not what its name says: left for its owner to look at
        lasting = policy.keep_every_steps and manifest.state.step % policy.keep_every_steps == 0
        if while_skipping or not lasting:
            _delete(folder)


def _prove(folder: Path) -> None:
    """Raise ValueError unless every byte is as it was written; files that did not change are read once a process."""
    if (identity := _identity(folder)) != _proven.get(folder):
        read_manifest(folder)
        _proven[folder] = identity


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
    known = {step_of(folder): folder for folder in reversed(steps(run))}
    if step not in known:
        raise ValueError(f"{run} has no checkpoint of step {step}; there are: {', '.join(map(str, known)) or 'none'}")
    read_manifest(known[step])
    moved = []
    for later in [folder for number, folder in known.items() if number > step]:
        target, number = run / "set_aside" / later.name, 1
        while target.exists():
            number += 1
            target = target.with_name(f"{later.name}.{number}")
        target.parent.mkdir(exist_ok=True)
        later.rename(target)
        moved.append(target)
    return moved
