"""Stages of a run: stretches of optimizer steps that each have their own data set, row length and mixture.

Short rows first and long ones later (a sequence-length curriculum), or the same rows in another mixture at the end (an
annealing phase). Every step has the same number of tokens, so the learning rate's schedule runs over all stages at once.
Which stage a step belongs to follows from the recipe alone, and the sample that comes next from the recipe and the samples
that each stage has used. Stages over one data set (one fingerprint) share its epochs: a later one goes on where the
earlier ones left each source. A data set packed from the same documents at another length is another data set.
"""

from collections.abc import Sequence

from storage.shards import ShardedDataset
from training.data import training_order
from training.decisions import Decision, amendments_of
from training.sampler import Drawn, SampleOrder
from training.sections import DataConfig


def stage_order(
    parts: Sequence[tuple[ShardedDataset, DataConfig]],
    used: Sequence[int],
    seed: int,
    decisions: Sequence[Decision] = (),
) -> SampleOrder:
    """The order of the last of `parts`, given how many samples each of the earlier ones used, and what was decided."""
    assert len(parts) == len(used) + 1
    drawn: dict[str, dict[str, Drawn]] = {}
    for stage, ((dataset, config), samples) in enumerate(zip(parts, used, strict=False)):
        fingerprint = dataset.manifest.fingerprint
        order = training_order(dataset, config, seed, drawn.get(fingerprint), amendments_of(decisions, stage))
        drawn[fingerprint] = order.drawn_after(samples)
    dataset, config = parts[-1]
    amendments = amendments_of(decisions, len(used))
    return training_order(dataset, config, seed, drawn.get(dataset.manifest.fingerprint), amendments)
