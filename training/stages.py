"""Stages of a run: stretches of optimizer steps that each have their own data set, row length and mixture.

Short rows first and long ones later (a sequence-length curriculum), or the same rows in another mixture at the end (an
annealing phase). Every step has the same number of tokens, so the learning rate's schedule runs over all stages at once.
Which stage a step belongs to follows from the recipe alone, and the sample that comes next from the recipe and the samples
that each stage has used. Stages over one data set (one fingerprint) share its epochs: a later one goes on where the
earlier ones left each source. A data set packed from the same documents at another length is another data set.
"""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field, model_validator

from training.data import DataConfig, training_order
from training.sampler import Drawn, SampleOrder
from training.shards import ShardedDataset


class StageConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    name: str | None = Field(default=None, min_length=1)
    """What the stage is called in logs, and its validation set after it; null: stage-1, stage-2, ..."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps of this stage."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Tokens of this stage (rounded up to whole steps)."""
    data: str | None = None
    """Folder made by data_prep.build, with the tokenizer of the others and any --seq-length; null: --data."""
    weights: dict[str, float] | None = None
    """Share of the samples per source, as `data.weights`; null: those of `data.weights`."""
    micro_batch_samples: int | None = Field(default=None, ge=1)
    """Rows per rank and forward pass; null: `training.micro_batch_samples` in the first stage, then as many tokens as there,
    as far as the step can be divided so, and at least one row."""

    @model_validator(mode="after")
    def _has_a_length(self):
        if (self.max_steps is None) == (self.max_tokens is None):
            raise ValueError("give exactly one of max_steps and max_tokens")
        return self

    def steps(self, step_tokens: int) -> int:
        return self.max_steps or -(-self.max_tokens // step_tokens)


def stage_order(parts: Sequence[tuple[ShardedDataset, DataConfig]], used: Sequence[int], seed: int) -> SampleOrder:
    """The order of the last of `parts`, given how many samples each of the earlier ones used."""
    assert len(parts) == len(used) + 1
    drawn: dict[str, dict[str, Drawn]] = {}
    for (dataset, config), samples in zip(parts, used, strict=False):
        fingerprint = dataset.manifest.fingerprint
        order = training_order(dataset, config, seed, drawn.get(fingerprint))
        drawn[fingerprint] = order.drawn_after(samples)
    dataset, config = parts[-1]
    return training_order(dataset, config, seed, drawn.get(dataset.manifest.fingerprint))
