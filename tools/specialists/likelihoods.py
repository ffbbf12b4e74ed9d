"""What each adapter of a run thinks of every token of a data set, from which every way to use them is calculated.

Legend: N members, R rows, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
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
from tools.evaluation.domains import document_of_each
from tools.trained import load_checkpoint, usable
from training.data import make_batch
from training.scores import scores

BATCH_ROWS = 32


class Likelihoods(NamedTuple):
    """Of the rows of a source."""

    log_likelihoods: Tensor
    """Of each target, float64 [N, R, T]; 0 where there is none."""
    begins: Tensor
    """bool [R, T]: where pieces of documents do."""
    documents: Tensor
    """int64 [R, T]: the number of each token's document; -1 for padding."""
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
        """Of each document the member that it is most likely under, all its pieces together."""
        numbers, place = self.documents.flatten().unique(return_inverse=True)
        of_documents = self.log_likelihoods.new_zeros(len(self.log_likelihoods), len(numbers))
        of_documents.index_add_(1, place, self.log_likelihoods.flatten(1))
        return of_documents.argmax(0)[numbers >= 0].tolist()


def open_members(run: Path) -> tuple[Llama, list[str]]:
    """The base of a run with all its adapters, and their names."""
    model = load_checkpoint(*find(run), torch.float32, usable(None), None).eval()
    return model, list(model.config.adapters.names)


def batches(dataset: ShardedDataset, source: str) -> Iterator[tuple[Documents, Tensor, Tensor, Tensor]]:
    """Pieces, documents' numbers, inputs and targets of all rows of a source, some rows at a time."""
    number = dataset.sources.index(source)
    for first in range(0, dataset.rows_per_source[source], BATCH_ROWS):
        rows = np.arange(first, min(first + BATCH_ROWS, dataset.rows_per_source[source]))
        batch = make_batch(dataset, np.full(len(rows), number), rows)
        numbers = torch.from_numpy(np.stack([document_of_each(dataset, source, row) for row in rows.tolist()]))
        yield Documents.from_position_ids(batch["position_ids"]), numbers, batch["input_ids"], batch["targets"]


@torch.inference_mode()
def measure(model: Llama, dataset: ShardedDataset, source: str, members: list[int | None]) -> Likelihoods:
    """`members`: places of adapters; None: the base alone."""
    there = model.embed_tokens.weight.device
    found, begins, numbers, counted = [], [], [], 0
    for documents, of_documents, inputs, targets in batches(dataset, source):
        of_all = []
        for member in members:
            routed = Documents.from_position_ids(documents.position_ids, there)
            routed.routing = None if member is None else torch.full((len(inputs),), member, device=there)
            hidden = model.hidden_states(inputs.to(there), routed)
            losses = linear_cross_entropy(hidden, weight=model.lm_head.weight, targets=targets.to(there))[1]
            of_all.append(-losses.double().cpu())
        found.append(torch.stack(of_all))
        begins.append(documents.begins.cpu())
        numbers.append(of_documents)
        counted += int((targets >= 0).sum())
    return Likelihoods(torch.cat(found, 1), torch.cat(begins), torch.cat(numbers), counted)


def bits_per_byte(dataset: ShardedDataset, source: str, loss_sum: float, targets: int) -> float:
    """Of `loss_sum` nats."""
    return scores(dataset, loss_sum, targets, [source])["bits_per_byte"]
