"""Loss on named sets with a live engine: the same figures for every number of ranks."""

import torch

from engine.plan import RunPlan
from engine.step import forward, sum_over_ranks
from engine.topology import Topology
from training.data import validation_batches
from training.scores import scores
from training.shards import ShardedDataset


def validate_all(engine, plan: RunPlan, topology: Topology) -> dict[str, dict[str, float]]:
    """`validate` on every set of the plan, by name."""
    limit = plan.recipe.validation.max_samples
    return {
        name: validate(engine, dataset, plan.batch.micro_batch_samples, topology, limit)
        for name, dataset in plan.validation_sets.items()
    }


def validate(
    engine, dataset: ShardedDataset, micro_batch_samples: int, topology: Topology, max_samples: int | None = None
) -> dict[str, float]:
    """The scores of a set, or of its first `max_samples` rows. Collective over all ranks."""
    engine.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for batch in validation_batches(dataset, micro_batch_samples, topology.world_size, topology.rank, max_samples):
            _, loss_sum = forward(engine, batch, 0.0)
            sums += torch.tensor([float(loss_sum), batch["num_targets"]], dtype=torch.float64)
    engine.train()
    return scores(dataset, *sum_over_ranks(engine, sums.tolist()))
