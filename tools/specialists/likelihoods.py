"""What each adapter of a run thinks of every token of a data set, from which every way to use them is calculated.

Legend: N members, R rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.checkpoint.folder import find
from model.documents import Documents
from model.llama import Llama
from model.loss import linear_cross_entropy
from model.mixture import mix
from storage.shards import ShardedDataset
from tools.trained import load_checkpoint
from training.data import make_batch
from training.scores import scores

BATCH_ROWS = 32


class Likelihoods(NamedTuple):
    """Of the rows of a source."""

    log_likelihoods: Tensor
    """Of each target, float64 [N, R, T]; 0 where there is none."""
    begins: Tensor
    """bool [R, T]: where documents do."""
    targets: int

    def mixed(self, share: float) -> float:
        """-log p of all targets under the mixture of the members with an equal prior and g = `share` (see model/mixture.py)."""
        members = len(self.log_likelihoods)
        log_prior = torch.full((members,), 1 / members, dtype=torch.float64).log()
        return -float(mix(self.log_likelihoods, self.begins, log_prior, share).log_likelihoods.sum())

    def of_members(self) -> list[float]:
        """-log p of all targets under each of them."""
        return (-self.log_likelihoods.sum((1, 2))).tolist()

    def likeliest(self) -> list[int]:
        """Of each document the member that it is most likely under."""
        document = self.begins.flatten().cumsum(0) - 1
        of_documents = self.log_likelihoods.new_zeros(len(self.log_likelihoods), int(document[-1]) + 1)
        of_documents.index_add_(1, document, self.log_likelihoods.flatten(1))
        carries = torch.zeros(of_documents.shape[1]).index_add_(
            0, document, (self.log_likelihoods != 0).any(0).flatten().float()
        )
        return of_documents.argmax(0)[carries > 0].tolist()  # padding is no document


def open_members(run: Path) -> tuple[Llama, list[str]]:
    """The base of a run with all its adapters, and their names."""
    model = load_checkpoint(*find(run), torch.float32, "cuda" if torch.cuda.is_available() else "cpu", None).eval()
    return model, list(model.config.adapters.names)


def batches(dataset: ShardedDataset, source: str) -> Iterator[tuple[Documents, Tensor, Tensor]]:
    """Documents, inputs and targets of all rows of a source, some rows at a time."""
    number = dataset.sources.index(source)
    for first in range(0, dataset.rows_per_source[source], BATCH_ROWS):
        rows = np.arange(first, min(first + BATCH_ROWS, dataset.rows_per_source[source]))
        batch = make_batch(dataset, np.full(len(rows), number), rows)
        yield Documents.from_position_ids(batch["position_ids"]), batch["input_ids"], batch["targets"]


@torch.inference_mode()
def measure(model: Llama, dataset: ShardedDataset, source: str, members: list[int | None]) -> Likelihoods:
    """`members`: places of adapters; None: the base alone."""
    device = model.embed_tokens.weight.device
    found, begins, counted = [], [], 0
    for documents, inputs, targets in batches(dataset, source):
        of_all = []
        for member in members:
            there = Documents.from_position_ids(documents.position_ids, device)
            there.routing = None if member is None else torch.full((len(inputs),), member, device=device)
            hidden = model.hidden_states(inputs.to(device), there)
            losses = partial(linear_cross_entropy, weight=model.lm_head.weight)(hidden, targets=targets.to(device))[1]
            of_all.append(-losses.double().cpu())
        found.append(torch.stack(of_all))
        begins.append(documents.begins.cpu())
        counted += int((targets >= 0).sum())
    return Likelihoods(torch.cat(found, 1), torch.cat(begins), counted)


def bits_per_byte(dataset: ShardedDataset, source: str, loss_sum: float, targets: int) -> float:
    """Of `loss_sum` nats."""
    return scores(dataset, loss_sum, targets, [source])["bits_per_byte"]
