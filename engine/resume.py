"""Continue a run from its newest good checkpoint, in the same layout or in any other.

The same layout loads DeepSpeed's own files and is exact to the bit. Another number of ranks, ZeRO stage, precision or
offload reads the same files parameter by parameter, without a separate command, and is exact to rounding.
"""

from pathlib import Path

from pydantic import ValidationError

from engine.checkpoint import MANIFEST, CheckpointManifest, Layout, layout_of, steps
from engine.native import read_states
from engine.plan import RunPlan
from engine.transplant import transplant
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
    fixed = {key for key in changes if key.startswith("model.") or key in ("training.seed", "optimizer.name")}
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
        path, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name)
        if path is None:
            raise ValueError(f"{folder}: DeepSpeed could not load this checkpoint")
    else:
        transplant(engine, read_states(folder, manifest))
        engine.global_steps, engine.global_samples = manifest.state.step, manifest.state.consumed_samples
    for group, hyperparameters in zip(engine.optimizer.param_groups, groups, strict=True):
        group.update(hyperparameters)
    if engine.gradient_compression:
        engine.gradient_compression.restore(folder)
    return manifest.state


def _loads_natively(there: Layout, here: Layout) -> bool:
    """Whether DeepSpeed's files are cut as this engine's states are; stage 0 keeps them whole on every rank."""
    whole = {"world_size": 1} if here.zero_stage == 0 else {}
    return here.model_copy(update=whole) == there.model_copy(update=whole)
