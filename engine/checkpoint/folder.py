"""Which checkpoint of a run is read: the newest good one, or that of a step. How they are written: `engine.checkpoint.saving`."""

import sys
from pathlib import Path

from engine.checkpoint.manifest import (
    CheckpointManifest,
    FindChange,
    find_change,
    folder_name,
    folder_of,
    read_manifest,
    steps,
    strangers,
)
from engine.checkpoint.retention import delete_folder, set_aside
from engine.checkpoint.verification import on_first_rank


def newest_good(
    run: Path, full: bool = True, find_change: FindChange = find_change
) -> tuple[Path, CheckpointManifest, list[str]] | None:
    """The newest intact checkpoint, and a sentence for each thing passed over; None when there is none at all.

    `full`, `find_change`: as in `read_manifest`.
    Raises ValueError when checkpoints exist but every one is damaged or renamed: starting afresh would throw a run away.
    """
    damaged = [
        f"{path} is passed over: only folders with a name like {folder_name(10)} are checkpoints"
        for path in strangers(run)
    ]
    for folder in steps(run):
        try:
            manifest = read_manifest(folder, full, find_change)
            if manifest.format_version == 1:
                damaged.append(f"{folder}: its manifest is of an older version, without a digest of its own")
            return folder, manifest, damaged
        except ValueError as error:
            damaged.append(f"damaged checkpoint passed over: {error}")
    if damaged:
        raise ValueError(
            f"{run}: every checkpoint is damaged or renamed; restore one or choose another --output\n"
            + "\n".join(damaged)
        )
    return None


def agree_on_checkpoint(
    run: Path, resume_step: int | None = None
) -> tuple[tuple[Path, CheckpointManifest] | None, list[str]]:
    """The first rank's `newest_good`, for which all ranks read a share of the files, told to all ranks.

    What an interrupted save left behind is deleted first; with `resume_step`, later checkpoints are set aside.
    """

    def choose(find_change: FindChange) -> tuple[tuple[Path, CheckpointManifest] | None, list[str]]:
        leftovers = sorted((run / "checkpoints").glob(".*.partial"))
        words = [sentence for leftover in leftovers for sentence in delete_folder(leftover)]
        aside = set_aside(run, resume_step, find_change) if resume_step is not None else []
        if (found := newest_good(run, find_change=find_change)) is None:
            return None, []
        return found[:2], [*found[2], *words, *(f"moved out of the way: {folder}" for folder in aside)]

    return on_first_rank(choose)


def find(run: Path, step: int | None = None, find_change: FindChange = find_change) -> tuple[Path, CheckpointManifest]:
    """A checkpoint to read from: the given step's, else the newest good one, with a warning on stderr for each damaged.

    Raises ValueError when there is none.
    """
    if step is not None:
        folder = folder_of(run, step)
        return folder, read_manifest(folder, find_change=find_change)
    if (found := newest_good(run, find_change=find_change)) is None:
        raise ValueError(f"{run} has no checkpoint: give the --output folder of a training run")
    for sentence in found[2]:
        print(sentence, file=sys.stderr)
    return found[0], found[1]
