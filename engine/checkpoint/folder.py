"""Checkpoints that prove themselves: `RUN/checkpoints/step-00001000/` is DeepSpeed's files and our manifest.

1. All ranks write DeepSpeed's files into a hidden folder `.step-00001000.partial`.
2. Every file is flushed to disk and hashed, each rank taking its share; the first rank writes `manifest.json` last.
3. The folder is renamed. Only a `step-*` folder whose manifest matches every byte counts as a checkpoint, so whatever
   is interrupted, the newest good one is found and a damaged one is skipped with a warning.
"""

import datetime
import errno
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from engine.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    FindChange,
    StateLayout,
    digest_of_file,
    find_change,
    folder_name,
    folder_of,
    read_manifest,
    seal,
    steps,
    strangers,
)
from engine.checkpoint.retention import delete_folder, set_aside
from engine.checkpoint.verification import of_this_rank, on_first_rank
from engine.engine import Engine
from engine.layout.names import named_parameters
from launch.peers import FAILED_COLLECTIVE
from storage.atomic import publish, write_atomically
from training.state import TrainState

DISK_FAULT = re.compile("enforce fail|iostream|PytorchStreamWriter|write failed|No space left|Parent directory")
"""Of the RuntimeErrors by which `torch.save` says that the file system refused."""


def layout_of(engine: Engine) -> StateLayout:
    return StateLayout(
        zero_stage=engine.zero_stage,
        world_size=dist.get_world_size(),
        wrapper=type(engine.optimizer).__name__,
        optimizer=type(engine.base_optimizer).__name__,
        stage_bounds=engine.pipeline_bounds,
        tensor=engine.mesh.tensor,
    )


def _parameter_order(engine: Engine) -> list[str]:
    if engine.zero_stage > 0:
        return []
    names = {id(parameter): name for name, parameter in named_parameters(engine.module)}
    return [names[id(p)] for group in engine.base_optimizer.param_groups for p in group["params"] if id(p) in names]


def save(engine: Engine, run: Path, state: TrainState, facts: dict[str, Any]) -> Path:
    """Write the checkpoint of this step. Collective over all ranks.

    `facts`: recipe, ds_config, environment and data, as the manifest's fields. Raises ValueError on the rank on which
    the file system refuses (a full disk, say); no `step-*` folder appears then, and the older ones are untouched.
    """
    try:
        return _save(engine, run, state, facts)
    except (OSError, RuntimeError) as error:
        if FAILED_COLLECTIVE.search(str(error)):
            raise  # another rank is the reason, not the disk
        if not isinstance(error, OSError) and not DISK_FAULT.search(str(error)):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, OSError):
            reason = error.strerror or reason
        elif shutil.disk_usage(run).free < 1 << 20:
            reason = os.strerror(errno.ENOSPC)
        earlier = "the earlier ones are as they were" if steps(run) else "there is no earlier one"
        raise ValueError(
            f"{run / 'checkpoints'}: the checkpoint of step {state.step} could not be written ({reason}); {earlier}: "
            "make room or mend the file system and run the same command again"
        ) from None


def _save(engine: Engine, run: Path, state: TrainState, facts: dict[str, Any]) -> Path:
    root = run / "checkpoints"
    final = root / folder_name(state.step)
    partial = root / f".{final.name}.partial"
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    client_state = {"longform": state.model_dump()}
    options: dict[str, Any] = {"save_latest": False, "exclude_frozen_parameters": True}
    engine.deepspeed.save_checkpoint(str(root), tag=partial.name, client_state=client_state, **options)
    if engine.reduction:
        engine.reduction.save(partial)
    files = _sync_and_hash(partial)
    if first:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        parameters = _parameter_order(engine)
        place: dict[str, Any] = {"layout": layout_of(engine), "parameters": parameters, "base": engine.base}
        if engine.prior:
            place["prior"] = engine.prior.state
        manifest = CheckpointManifest(**place, state=state, files=files, created=now, **facts)
        write_atomically(partial / MANIFEST, seal(manifest))
        shutil.rmtree(final, ignore_errors=True)
        publish(partial, final)
    dist.barrier()
    return final


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


def _sync_and_hash(folder: Path) -> dict[str, tuple[int, str]]:
    """Sizes and digests of all files, the work shared between the ranks."""
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    mine = {}
    for name in of_this_rank(sizes):
        path = folder / name
        with path.open("rb") as file:
            os.fsync(file.fileno())
        mine[name] = (sizes[name], digest_of_file(path))
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, mine)
    return {name: entry for some in of_ranks for name, entry in some.items()}
