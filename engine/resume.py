"""Continue a run from its newest good checkpoint, in the same layout or on another number of ranks.

The same layout loads DeepSpeed's own files and is exact to the bit. Another number of ranks is converted on the way
(DeepSpeed universal checkpoint), without a separate command, to the rounding of another order of summation.
"""

import argparse
import contextlib
import io
import shutil
from pathlib import Path

import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from pydantic import ValidationError

from engine.checkpoint import MANIFEST, CheckpointManifest, Layout, layout_of, steps
from engine.plan import RunPlan
from training.config import Recipe
from training.state import TrainState


def check_resumable(run: Path, plan: RunPlan, allow_data_change: bool) -> list[str]:
    """Compare today's recipe and data with those of the run's newest checkpoint, before anything is built.

    Returns a sentence for each recipe key that changed and may. Raises ValueError naming those that may not.
    """
    manifests = (folder / MANIFEST for folder in steps(run) if (folder / MANIFEST).is_file())
    newest = next(manifests, None)
    if newest is None:
        return []
    try:
        manifest = CheckpointManifest.model_validate_json(newest.read_bytes())
        before = Recipe.model_validate(manifest.recipe).model_dump()
    except ValidationError:
        return []  # damaged: the search for a good checkpoint will say so
    changes = {
        f"{section}.{key}": (before[section][key], value)
        for section, keys in plan.recipe.model_dump().items()
        for key, value in keys.items()
        if before[section][key] != value
    }
    fixed = {key for key in changes if key.startswith("model.") or key == "training.seed"}
    if not allow_data_change:
        fixed |= changes.keys() & {"data.weights"}
    problems = [f"{key} was {changes[key][0]!r} and is now {changes[key][1]!r}" for key in sorted(fixed)]
    if manifest.state.data_fingerprint != plan.dataset.manifest.fingerprint and not allow_data_change:
        problems.append("the data set is another one (its fingerprint differs)")
    if problems:
        raise ValueError(
            f"the run in {run} cannot be continued: {'; '.join(problems)}. Restore the old values, choose another "
            "--output or, for data only, pass --allow_data_change"
        )
    return [f"{key} changed from {old!r} to {new!r}" for key, (old, new) in changes.items()]


def restore(engine, folder: Path, manifest: CheckpointManifest) -> TrainState:
    """Load weights and optimizer states into a fresh engine. Collective over all ranks.

    Hyperparameters stay those of the recipe: they are put back after the load, which would overwrite them.
    """
    groups = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
    here = layout_of(engine)
    if _loads_natively(manifest.layout, here):
        _load(engine, folder)
    else:
        _load_converted(engine, folder, manifest.layout, here)
    for group, hyperparameters in zip(engine.optimizer.param_groups, groups, strict=True):
        group.update(hyperparameters)
    return manifest.state


def _loads_natively(there: Layout, here: Layout) -> bool:
    if here == there:
        return True
    same_classes = (here.wrapper, here.optimizer) == (there.wrapper, there.optimizer)
    if here.zero_stage == there.zero_stage == 0:
        return same_classes
    return same_classes and here.world_size == there.world_size and {here.zero_stage, there.zero_stage} == {1, 2}


def _load(engine, folder: Path) -> None:
    path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if path is None:
        raise ValueError(f"{folder}: DeepSpeed could not load this checkpoint")


def _load_converted(engine, folder: Path, there: Layout, here: Layout) -> None:
    if (there.zero_stage in (1, 2)) != (here.zero_stage in (1, 2)) or 0 in (there.zero_stage, here.zero_stage):
        raise ValueError(
            f"{folder} was written by {there} and cannot continue as {here}: stages 1 and 2 convert into each other, "
            "stage 3 into stage 3 and stage 0 into stage 0, each on any number of ranks"
        )
    universal = folder.with_name(f".{folder.name}.universal.partial")
    if dist.get_rank() == 0:
        print(f"converting {folder.name} from {there} to {here} ...", flush=True)
        shutil.rmtree(universal, ignore_errors=True)
        _convert(folder, universal)
    dist.barrier()
    engine._config.load_universal_checkpoint = True
    try:
        _load(engine, universal)
    finally:
        engine._config.load_universal_checkpoint = False
    for state in engine.basic_optimizer.state.values():
        if hasattr(state.get("step"), "clone"):
            state["step"] = state["step"].clone()  # DeepSpeed's stage 3 shares one counter between its groups
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(universal)


def _convert(folder: Path, universal: Path) -> None:
    options = argparse.Namespace(
        input_folder=str(folder),
        output_folder=str(universal),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=False,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(options)
