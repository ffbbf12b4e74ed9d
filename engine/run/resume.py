"""Continue a run from its newest good checkpoint, in the same layout or in any other.

The same layout loads DeepSpeed's own files and is exact to the bit. Another number of ranks, ZeRO stage, precision or
offload reads of the same files what each rank keeps, without a separate command, and is exact to rounding.
"""

import contextlib
import pickle
from pathlib import Path

from pydantic import ValidationError

from engine import internals
from engine.checkpoint.deepspeed_files import CheckpointFiles
from engine.checkpoint.manifest import MANIFEST, CheckpointManifest, StateLayout, step_of, steps, unseal
from engine.checkpoint.saving import layout_of
from engine.checkpoint.transplant import transplant
from engine.engine import Engine
from engine.run.plan import RunPlan
from engine.safe_load import refusal
from training.config import Recipe
from training.state import TrainState


def check_resumable(run: Path, plan: RunPlan, allow_data_change: bool, resume_step: int | None = None) -> list[str]:
    """Compare today's recipe and data with those of the run's newest checkpoint (or that of `resume_step`).

    Returns a sentence for each recipe key that changed and may. Raises ValueError naming those that may not.
    """
    manifest = _newest_manifest(run, resume_step)
    if manifest is None:
        return []
    try:
        before = Recipe.model_validate(manifest.recipe).model_dump()
    except ValidationError:
        return [f"{run}: its recipe is of another version, so what changed since cannot be said"]
    changes = {
        f"{section}.{key}": (before[section][key], value)
        for section, keys in plan.recipe.model_dump(exclude={"stages"}).items()
        for key, value in keys.items()
        if before[section][key] != value and (key, value) != ("activation_checkpointing", "auto")  # decided anew
    }
    fixed = {key for key in changes if key.startswith("model.") or key in ("training.seed", "optimizer.name")}
    if plan.recipe.model.position_embedding != "learned" and plan.recipe.model.rope_scaling is None:
        fixed -= {"model.max_position_embeddings"}  # nothing is computed from it: a longer stage may be appended
    problems = [f"{key} was {changes[key][0]!r} and is now {changes[key][1]!r}" for key in sorted(fixed)]
    whole = {"fingerprint": manifest.state.data_fingerprint, "weights": before["data"]["weights"], "first_step": 1}
    former = manifest.data.get("stages", [whole])  # the checkpoint may be older than stages are
    problems += _stage_problems(former, plan, manifest.state.step, allow_data_change)
    if problems:
        raise ValueError(
            f"the run in {run} cannot be continued: {'; '.join(problems)}. Restore the old values, choose another "
            "--output or, for data only, pass --allow_data_change"
        )
    notices = [f"{key} changed from {old!r} to {new!r}" for key, (old, new) in changes.items()]
    if plan.recipe.model_dump()["stages"] != before["stages"]:
        words = [f"{s.name} to step {s.end} on {s.data}" for s in plan.stages if s.end > manifest.state.step]
        notices.append(f"stages changed; after step {manifest.state.step} come: {', '.join(words) or 'none'}")
    return notices


def _newest_manifest(run: Path, step: int | None) -> CheckpointManifest | None:
    """Without a look at other files: the search for a good checkpoint will say what is damaged."""
    for folder in steps(run):
        if step in (None, step_of(folder)):
            with contextlib.suppress(OSError, ValueError):
                manifest = unseal((folder / MANIFEST).read_bytes())
                if step_of(folder) == manifest.state.step:
                    return manifest
    return None


def _stage_problems(former: list[dict], plan: RunPlan, steps: int, allow_data_change: bool) -> list[str]:
    """Why the stages of the plan cannot take the place of the former ones, of which `steps` steps are done.

    Where a stage begins, its data and weights are fixed once it has begun; how long it still is, and what comes later, is not.
    """
    before = [stage for stage in former if stage["first_step"] <= steps]
    now = [stage.describe() for stage in plan.stages if stage.begin < steps]
    begins = [[stage["first_step"] for stage in stages] for stages in (before, now)]
    if begins[0] != begins[1]:
        return [f"until step {steps} stages began at steps {begins[0]}, in the recipe they begin at steps {begins[1]}"]
    problems = []
    for old, new in zip(before, now, strict=True):
        label = f"stages: {new['name']}: " if plan.recipe.stages else ""
        if old["weights"] != new["weights"]:
            key = "weights" if label else "data.weights"
            problems.append(f"{label}{key} was {old['weights']!r} and is now {new['weights']!r}")
        if old["fingerprint"] != new["fingerprint"]:
            problems.append(f"{label}the data set is another one (its fingerprint differs)")
    return [] if allow_data_change else problems


def restore(engine: Engine, folder: Path, manifest: CheckpointManifest) -> TrainState:
    """Load weights and optimizer states into a fresh engine. Collective over all ranks.

    Hyperparameters stay those of the recipe: they are put back after the load, which would overwrite them.
    """
    # DeepSpeed and the compressed reduction look for their files by pattern.
    unnamed = sorted(path.name for path in folder.glob("*.pt") if path.name not in manifest.files)
    if unnamed:
        raise ValueError(f"{folder} holds {', '.join(unnamed)}, which its manifest does not name: move it elsewhere")
    if manifest.base != engine.base:
        raise ValueError(
            f"{folder}: its adapters were trained on other weights than those of training.initial_weights: restore these"
        )
    groups = [{k: v for k, v in group.items() if k != "params"} for group in engine.optimizer.param_groups]
    here = layout_of(engine)
    if _loads_natively(manifest.layout, here) and (
        here.zero_stage == 0 or engine.deepspeed.zero_load_from_fp32_weights()
    ):
        _load_natively(engine, folder)
    else:
        with CheckpointFiles(folder, manifest) as files:
            transplant(engine, files)
        internals.continue_from(engine.deepspeed, manifest.state.step, manifest.state.consumed_samples)
    for group, hyperparameters in zip(engine.optimizer.param_groups, groups, strict=True):
        group.update(hyperparameters)
    if engine.reduction:
        engine.reduction.restore(folder)
    if engine.prior and manifest.prior:
        engine.prior.restore(manifest.prior)
    return manifest.state


def _load_natively(engine: Engine, folder: Path) -> None:
    try:
        strict = not engine.config.adapters.freeze_base
        path, _ = engine.deepspeed.load_checkpoint(str(folder.parent), folder.name, load_module_strict=strict)
    except pickle.UnpicklingError as error:
        raise refusal(folder, error) from None
    if path is None:
        raise ValueError(f"{folder}: DeepSpeed could not load this checkpoint")
    if engine.zero_stage in (1, 2):  # older checkpoints have working weights too, which follow from the master weights
        engine.optimizer.update_lp_params()


def _loads_natively(there: StateLayout, here: StateLayout) -> bool:
    """Whether DeepSpeed's files are cut as this engine's states are; stage 0 keeps them whole on every rank."""
    whole = {"world_size": 1} if here.zero_stage == 0 else {}
    return here.model_copy(update=whole) == there.model_copy(update=whole)
