"""From the plan of a run to its loop: at the first step, or where the newest good checkpoint stopped."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from engine.build import build_engine
from engine.checkpoint.folder import agree_on_checkpoint
from engine.checkpoint.manifest import CheckpointManifest
from engine.engine import Engine
from engine.run.initial_weights import Fingerprinted, adapters_at_start, read_initial_weights
from engine.run.loop import TrainingLoop, new_state
from engine.run.plan import RunPlan
from engine.run.resume import restore
from engine.run.rewind import recall_decisions


class Beginning(NamedTuple):
    loop: TrainingLoop
    checkpoint: tuple[Path, CheckpointManifest] | None
    """What the run continues from."""
    damaged: list[str]
    """A sentence for each newer checkpoint that is none."""


def begin(plan: RunPlan) -> TrainingLoop:
    """At the first step, with the recipe's initial weights. Collective over all ranks."""
    return TrainingLoop(_engine_of(plan, read_initial_weights(plan.recipe), fresh=True), plan, new_state(plan))


def begin_or_continue(plan: RunPlan, run: Path, resume_step: int | None = None) -> Beginning:
    """`resume_step`: go back to this one. Collective over all ranks."""
    found, damaged = agree_on_checkpoint(run, resume_step)
    loop = begin(plan) if found is None else _continue(plan, found, resume_step)
    loop.state.decisions = recall_decisions(plan, loop.state, run)
    return Beginning(loop, found, damaged)


def _continue(plan: RunPlan, found: tuple[Path, CheckpointManifest], resume_step: int | None) -> TrainingLoop:
    frozen = plan.recipe.adapters.freeze_base
    engine = _engine_of(plan, read_initial_weights(plan.recipe) if frozen else None)
    state = restore(engine, *found)
    if resume_step is not None:
        state = state.model_copy(update={"wandb_id": new_state(plan).wandb_id})  # W&B takes no step back
    return TrainingLoop(engine, plan, state)


def _engine_of(plan: RunPlan, weights: Iterator[tuple[str, Tensor]] | None, fresh: bool = False) -> Engine:
    """`weights`: of all layers, or of the base of adapters, which have weights of their own to start `fresh` from."""
    recipe, base, everything = plan.recipe, None, weights
    if weights is not None and recipe.adapters.names:
        base = Fingerprinted(weights)
        everything = chain(base, adapters_at_start(recipe, base) if fresh else ())
    engine = build_engine(recipe, plan.ds_config, plan.mesh, plan.pipeline_bounds, everything)
    engine.base = base.digest if base and recipe.adapters.freeze_base else None
    engine.head_loss.know(plan.sources)
    return engine
