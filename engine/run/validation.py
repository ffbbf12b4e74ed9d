"""Loss on named sets with a live engine: the same figures for every number of ranks."""

from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np

from engine.engine import Engine
from engine.run.plan import RunPlan
from engine.survey import survey
from storage.shards import ShardedDataset
from training.data import validation_batches
from training.objective import Masking, recipe_masking
from training.routing import Labels, labels_of_sources
from training.scores import scores

BATCHES_AT_ONCE = 32


def validate_all(
    engine: Engine, plan: RunPlan, stopping: Callable[[], bool] = lambda: False
) -> dict[str, dict[str, Any]] | None:
    """`validate` on every set of the plan, by name, with as many tokens in a forward pass as the first stage trains on."""
    limit = plan.recipe.validation.max_samples
    tokens = plan.batch.micro_batch_samples * plan.dataset.manifest.seq_length
    results = {}
    for name, dataset in plan.validation_sets.items():
        # the same masks in every run, whatever its seed
        masking = recipe_masking(plan.recipe, dataset.manifest, "validation", seed=0)
        rows = max(1, tokens // dataset.manifest.seq_length)
        if (scores_of_set := validate(engine, dataset, rows, limit, masking, stopping)) is None:
            return None
        results[name] = scores_of_set
    return results


def validate(
    engine: Engine,
    dataset: ShardedDataset,
    micro_batch_samples: int,
    max_samples: int | None = None,
    masking: Masking | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """The scores of a set, or of `max_samples` rows of it. Collective over all ranks.

    Where the next token is predicted without adapters, of several sources the loss of each too, by name.
    None when `stopping`, which is asked between batches and must answer the same on all ranks, says that time is short.
    """
    mesh, names = engine.mesh, dataset.sources
    labels = labels_of_sources(engine.config.adapters, dataset, engine.head_loss.sources)
    plain = labels is None and masking is None and engine.head_loss.contrast is None
    apart = len(names) if plain and len(names) > 1 else 0
    limits = mesh.data, mesh.data_rank, max_samples
    labels = Labels(None, np.arange(apart)) if apart else labels
    batches = validation_batches(dataset, micro_batch_samples, *limits, masking, labels)
    loss_sum, targets, of_sources = 0.0, 0, np.zeros(2 * apart)
    engine.head_loss.sources_apart = apart
    try:
        while some := list(islice(batches, BATCHES_AT_ONCE)):
            if stopping():
                return None
            targets += survey(engine, some).targets
            for sums in engine.sums(some):
                loss_sum += float(sums[0])
                if apart and mesh.counts:
                    of_sources += sums[-2 * apart :].cpu().numpy()
    finally:
        engine.head_loss.sources_apart = 0
    total, *totals = engine.sum_over_tokens([loss_sum, *of_sources])
    found: dict[str, Any] = scores(dataset, total, targets, masking=masking)
    if apart:
        parts = zip(names, totals[:apart], totals[apart:], strict=True)
        found["loss_by_source"] = {name: loss / count for name, loss, count in parts if count}
    return found
