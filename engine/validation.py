"""Loss on named sets with a live engine: the same figure for every number of ranks."""

import math

import torch

from engine.plan import RunPlan
from engine.step import forward, sum_over_ranks
from engine.topology import Topology
from training.data import validation_batches
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
    """Loss in nats per target, bits per byte of text, and the number of targets. Collective over all ranks.

    Bits per byte take the set's own ratio of targets to UTF-8 bytes, so they compare across tokenizers; with
    `max_samples` the ratio is still that of the whole set.
    """
    engine.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for batch in validation_batches(dataset, micro_batch_samples, topology.world_size, topology.rank, max_samples):
            _, loss_sum = forward(engine, batch, 0.0)
            sums += torch.tensor([float(loss_sum), batch["num_targets"]], dtype=torch.float64)
    engine.train()
    loss_sum, targets = sum_over_ranks(engine, sums.tolist())
    loss = loss_sum / targets
    sources = dataset.manifest.splits[dataset.split].values()
    targets_per_byte = sum(source.targets for source in sources) / sum(source.bytes for source in sources)
    return {"loss": loss, "bits_per_byte": loss / math.log(2) * targets_per_byte, "targets": int(targets)}
