"""What a summed loss means: nats per target, and bits per byte of text, which compares across tokenizers."""

import math
from collections.abc import Iterable

from training.shards import ShardedDataset


def scores(
    dataset: ShardedDataset, loss_sum: float, targets: float, sources: Iterable[str] | None = None
) -> dict[str, float]:
    """`loss` in nats per target, `perplexity`, `bits_per_byte`, and the number of `targets`, over some or all sources.

    Bits per byte take the sources' ratio of targets to UTF-8 bytes, also when only some of their rows were read.
    """
    loss = loss_sum / targets
    entries = dataset.manifest.splits[dataset.split]
    counted = [entries[name] for name in sources or entries]
    targets_per_byte = sum(entry.targets for entry in counted) / sum(entry.bytes for entry in counted)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss / math.log(2) * targets_per_byte,
        "targets": int(targets),
    }
