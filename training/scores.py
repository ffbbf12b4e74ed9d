"""What a summed loss means: nats per target, and bits per byte of text, which compares across tokenizers."""

import math
from collections.abc import Iterable

from storage.shards import ShardedDataset
from training.objective import Masking


def scores(
    dataset: ShardedDataset,
    loss_sum: float,
    targets: float,
    sources: Iterable[str] | None = None,
    masking: Masking | None = None,
) -> dict[str, float]:
    """`loss` in nats per target, `perplexity`, `bits_per_byte`, and the number of `targets`, over some or all sources.

    Bits per byte take the sources' ratio of targets to UTF-8 bytes (where only a part of the text carries loss, to those of
    that part), also when only some of their rows were read. Of a
    masked model whose mask ratio is drawn from [0, 1] all three are upper bounds; with a fixed ratio they belong to the
    masked tokens given the others, and there are no bits per byte.
    """
    loss = loss_sum / max(targets, 1)
    entries = dataset.manifest.splits[dataset.split]
    counted = [entries[name] for name in sources or entries]
    # masks leave out the end of every document
    targets_of_text = sum(e.targets - (e.documents if masking else 0) for e in counted)
    targets_per_byte = targets_of_text / sum(e.bytes if e.target_bytes is None else e.target_bytes for e in counted)
    result = {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "targets": int(targets)}
    if masking is None or masking.objective.drawn:
        result["bits_per_byte"] = loss / math.log(2) * targets_per_byte
    return result
