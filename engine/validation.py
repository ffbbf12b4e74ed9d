"""Loss on named sets with a live engine: the same figures for every number of ranks."""

from itertools import islice

import torch

from engine import pipeline
from engine.plan import RunPlan
from engine.step import forward, sum_over_tokens, survey
from training.data import validation_batches
from training.objective import Masking, recipe_masking
from training.scores import scores
from training.shards import ShardedDataset

BATCHES_AT_ONCE = 32


def validate_all(engine, plan: RunPlan) -> dict[str, dict[str, float]]:
    """`validate` on every set of the plan, by name, with as many tokens in a forward pass as the first stage trains on."""
    limit = plan.recipe.validation.max_samples
    tokens = plan.batch.micro_batch_samples * plan.dataset.manifest.seq_length
    results = {}
    for name, dataset in plan.validation_sets.items():
        # the same masks in every run, whatever its seed
        masking = recipe_masking(plan.recipe, dataset.manifest, "validation", seed=0)
        rows = max(1, tokens // dataset.manifest.seq_length)
        results[name] = validate(engine, dataset, rows, limit, masking)
    return results


def validate(
    engine,
    dataset: ShardedDataset,
    micro_batch_samples: int,
    max_samples: int | None = None,
    masking: Masking | None = None,
) -> dict[str, float]:
    """The scores of a set, or of `max_samples` rows of it. Collective over all ranks."""
    mesh = engine.mesh
    batches = validation_batches(dataset, micro_batch_samples, mesh.data, mesh.data_rank, max_samples, masking)
    loss_sum, targets = 0.0, 0
    engine.eval()
    while some := list(islice(batches, BATCHES_AT_ONCE)):
        targets += survey(engine, some)[0]
        if isinstance(engine, pipeline.PipelineEngine):
            loss_sum += float(pipeline.evaluate(engine, some)[1])
            continue
        with torch.no_grad():
            loss_sum += sum(float(forward(engine, batch, 0.0)[1]) for batch in some)
    engine.train()
    return scores(dataset, *sum_over_tokens(engine, [loss_sum]), targets, masking=masking)
