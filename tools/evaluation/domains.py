"""What several adapters on one base cost on each source of a data set: base, each by itself, their mixture, what they become
when they are merged.

Legend: N adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.checkpoint.manifest import CheckpointManifest
from engine.run.whole_weights import read_adapters, read_base
from model.adapter_config import AdaptersConfig, adapter_of
from model.config import ModelConfig
from model.documents import Documents
from model.llama import Llama
from model.merge_ways import Choice
from model.merging import combined
from storage.shards import ShardedDataset
from tools.evaluation.long_context import token_losses
from tools.trained import adapters_of
from training.batch import Batch
from training.data import NO_TARGET, make_batch
from training.scores import scores

MEAN = "mean"
"""Of the sources, each counting once."""


class AdaptedBase(NamedTuple):
    """A base and adapters, of which models are made that share its weights."""

    config: ModelConfig
    """Without adapters."""
    base: dict[str, Tensor]
    adapters: AdaptersConfig
    """Those of the run, with the prior that it has learned."""
    state: dict[str, Tensor]
    """Parameters of all adapters by their names in a `Llama`."""

    def model(self, adapters: AdaptersConfig | None = None, state: Mapping[str, Tensor] | None = None) -> Llama:
        """With these adapters, all of which have a turn in the mixture (one is a mixture of one), or without."""
        kept = AdaptersConfig() if adapters is None else adapters.model_copy(update={"mode": "mixture"})
        with torch.device("meta"):
            model = Llama(self.config.model_copy(update={"adapters": kept}))
        like = self.base["embed_tokens.weight"]
        own = {name: tensor.to(like) for name, tensor in (state or {}).items()}
        missing, unknown = model.load_state_dict(self.base | own, strict=False, assign=True)
        assert not unknown
        assert set(missing) <= {"lm_head.weight"}
        if self.config.tie_word_embeddings:
            model.lm_head.weight = model.embed_tokens.weight
        return model.requires_grad_(False).eval()

    def unmerged(self) -> dict[str, Llama]:
        """Base, each adapter, and the mixture of all: by the prior at every token (g = 0), of whole documents (g = 1), and by the
        run's own share of evidence where that is another."""
        models = {"base": self.model()}
        for name in self.adapters.names:
            own = {key: tensor for key, tensor in self.state.items() if adapter_of(key) == name}
            models[name] = self.model(one(self.adapters, name), own)
        for evidence in sorted({0.0, 1.0, self.adapters.evidence}):
            models[f"mixture g={evidence:g}"] = self.mixture(evidence)
        return models

    def mixture(self, evidence: float) -> Llama:
        """Of all adapters by their prior, whatever the share of evidence was in training."""
        return self.model(self.adapters.model_copy(update={"evidence": evidence}), self.state)

    def merged(self, way: str, shares: Mapping[str, float | Tensor], choice: Choice | None = None) -> Llama:
        """With the adapter that those of `shares` become (see model/merging.py)."""
        return self.model(*combined(self.adapters, self.state, way, shares, choice))


def open_adapted(checkpoint: Path, manifest: CheckpointManifest, dtype: torch.dtype, device: str) -> AdaptedBase:
    """Of a run's checkpoint. Raises ValueError where the run has no adapters."""
    if not (adapters := adapters_of(manifest)).names:
        raise ValueError(f"{checkpoint}: this run has no adapters")
    config = ModelConfig.model_validate(manifest.recipe["model"]).model_copy(update={"adapters": AdaptersConfig()})
    base = {name: tensor.to(device, dtype) for name, tensor in read_base(checkpoint, manifest)}
    return AdaptedBase(config, base, adapters, read_adapters(checkpoint, manifest))


def one(adapters: AdaptersConfig, name: str) -> AdaptersConfig:
    """One of the adapters, by itself."""
    update = {"names": (name,), "r": adapters.rank(name), "lora_alpha": adapters.alpha(name), "initial_weights": {}}
    return adapters.model_copy(update=update | {"prior": {}, "prior_lr": None, "evidence": 1.0})


class Sample(NamedTuple):
    """What is read of a data set."""

    max_samples: int | None = None
    """Rows of each source at most, the first ones; None: all."""
    half: Literal[0, 1] | None = None
    """Of the documents of each source in these rows every second one, from the first or the second on; None: all."""

    def batches(self, dataset: ShardedDataset, source: str, batch_samples: int) -> Iterator[Batch]:
        """Rows in which something counts. Raises ValueError where there is one document, of which no half can be taken."""
        count = min(dataset.rows_per_source[source], self.max_samples or dataset.rows_per_source[source])
        documents = [dataset.row(source, row).seg_doc for row in range(count)]
        counted = np.unique(np.concatenate(documents))
        if self.half is not None:
            if len(counted) < 2:
                raise ValueError(
                    f"source {source} has one document in the rows that are read, and learning needs others than measuring: "
                    "read more rows, or build with more validation documents"
                )
            counted = counted[self.half :: 2]
        rows = [row for row in range(count) if np.isin(documents[row], counted).any()]
        number = dataset.sources.index(source)
        for first in range(0, len(rows), batch_samples):
            numbers = np.array(rows[first : first + batch_samples])
            batch = make_batch(dataset, np.full(len(numbers), number), numbers)
            kept = np.stack([np.isin(document_of_each(dataset, source, row), counted) for row in numbers])
            yield batch | {"targets": batch["targets"].masked_fill(~torch.from_numpy(kept), NO_TARGET)}


def document_of_each(dataset: ShardedDataset, source: str, row: int) -> np.ndarray:
    """Number of the document that each input of a row lies in, int64 [T]; -1 in padding."""
    pieces, tokens = dataset.row(source, row), dataset.manifest.seq_length
    numbers = np.repeat(pieces.seg_doc, pieces.seg_len)[:tokens].astype(np.int64)
    return np.pad(numbers, (0, tokens - len(numbers)), constant_values=-1)


def bits_per_byte(
    model: Llama, dataset: ShardedDataset, part: Sample | None = None, batch_samples: int = 4
) -> dict[str, float]:
    """Of each source, and `MEAN`."""
    found: dict[str, float] = {}
    device = model.embed_tokens.weight.device
    for source in dataset.sources:
        total, targets = 0.0, 0
        model.lm_head.loss.know([source])
        for batch in (part or Sample()).batches(dataset, source, batch_samples):
            documents = Documents.from_position_ids(batch["position_ids"], device)
            losses = token_losses(model, batch["input_ids"].to(device), batch["targets"].to(device), documents)
            total += float(losses.sum())
            targets += int((batch["targets"] != NO_TARGET).sum())
        found[source] = scores(dataset, total, targets, [source])["bits_per_byte"]
    return found | {MEAN: sum(found.values()) / len(found)}
