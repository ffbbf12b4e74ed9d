"""Does the model use the length of its documents? Loss by position, and the gain from seeing earlier chunks.

Position of a target: how many tokens of the same piece of a document precede it; a piece is what the model sees of a
document at once. Bucket k holds the positions 2^k .. 2^(k + 1) - 1. A loss that keeps falling with the position is the
first sign of a model that uses its context, but later text may simply be easier: the gain compares the same targets.

Standard errors are those of a mean over clusters: targets of one piece are not independent of each other.

Legend: B rows, T tokens of a row, P pieces, K buckets.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from console.progress import Progress
from model.documents import Documents
from model.llama import Llama
from model.loss import linear_cross_entropy
from storage.shards import ShardedDataset
from training.batch import Batch
from training.data import NO_TARGET, make_batch
from training.objective import Masking

TOKEN_BYTES = 8  # of the int64 ids that the model reads


class PositionSums:
    """Sums of a value of every target, by bucket of positions; sums of disjoint targets can be added."""

    def __init__(self, row_tokens: int) -> None:
        self.row_tokens = row_tokens
        buckets = row_tokens.bit_length()
        # of every bucket, and last of all together: targets n, values s, then over pieces s^2, s * n, n^2, pieces
        self.moments = np.zeros((6, buckets + 1))

    def add(self, position_ids: np.ndarray, counted: np.ndarray, values: np.ndarray, ahead: int = 1) -> None:
        """Arrays [B, T]: places of the inputs in their pieces, where there is a target, and its value.

        `ahead`: how many tokens after its input a target stands; 0 where it is the token behind a mask.
        """
        buckets = self.moments.shape[1] - 1
        piece = (np.cumsum(position_ids.ravel() == 0) - 1)[counted.ravel()]
        bucket = np.frexp(position_ids[counted] + ahead)[1] - 1
        cell, pieces = piece * buckets + bucket, np.max(piece, initial=-1) + 1
        n, s = (
            np.bincount(cell, weights, minlength=pieces * buckets).reshape(pieces, buckets)
            for weights in (None, values[counted].astype(np.float64))
        )
        n, s = (np.concatenate([x, x.sum(1, keepdims=True)], axis=1) for x in (n, s))
        self.moments += [x.sum(0) for x in (n, s, s * s, s * n, n * n, n > 0)]

    def __add__(self, other: PositionSums) -> PositionSums:
        total = PositionSums(self.row_tokens)
        total.moments = self.moments + other.moments
        return total

    @property
    def targets(self) -> int:
        return int(self.moments[0, :-1].sum())

    @property
    def total(self) -> float:
        """Sum of the values over all buckets."""
        return float(self.moments[1, :-1].sum())

    def overall(self, name: str) -> dict[str, Any]:
        """The mean, called `name`, and its `standard_error` over all targets."""
        return {name: self.total / self.targets, "standard_error": self._standard_error(-1)}

    def by_position(self, name: str) -> list[dict[str, Any]]:
        """`first` and `last` position, mean (`name`), `standard_error` and `targets` of each bucket that has some."""
        rows = []
        for k in range(self.moments.shape[1] - 1):
            n, s = self.moments[:2, k].tolist()
            if n:
                last = min(2 ** (k + 1) - 1, self.row_tokens)
                spread = {name: s / n, "standard_error": self._standard_error(k), "targets": int(n)}
                rows.append({"first": 2**k, "last": last} | spread)
        return rows

    def _standard_error(self, column: int) -> float | None:
        """Of the ratio of two sums over pieces (Cochran 1977, Sampling Techniques, section 2.11); None for one piece."""
        n, s, ss, sn, nn, pieces = self.moments[:, column].tolist()
        if pieces < 2:
            return None
        mean = s / n
        residual = max(0.0, ss - 2 * mean * sn + mean * mean * nn)
        return math.sqrt(residual * pieces / (pieces - 1)) / n


@dataclass(frozen=True)
class Losses:
    """What one pass over the rows of a source measured."""

    full: PositionSums
    """Cross-entropy in nats where a token sees all of its piece before it."""
    limited: dict[int, PositionSums]
    """The same targets where a token sees no further than its own chunk of so many tokens."""
    gains: dict[int, PositionSums]
    """How much lower the former are than the latter, target by target."""

    def __add__(self, other: Losses) -> Losses:
        limited = {c: sums + other.limited[c] for c, sums in self.limited.items()}
        gains = {c: sums + other.gains[c] for c, sums in self.gains.items()}
        return Losses(self.full + other.full, limited, gains)


def in_chunks(documents: Documents, chunk_tokens: int) -> Documents:
    """The same tokens at the same positions, but each sees only its own chunk of its document.

    Rotations that depend on the document's length stay those of the whole once `documents` has been through the model.
    """
    starts = (range(0, length, chunk_tokens) for length in documents.lengths)
    lengths = [
        min(chunk_tokens, length - start)
        for length, firsts in zip(documents.lengths, starts, strict=True)
        for start in firsts
    ]
    bounds = torch.tensor([0, *itertools.accumulate(lengths)]).to(documents.cu_seqlens)
    return replace(documents, lengths=lengths, cu_seqlens=bounds)


def measure(
    model: Llama,
    dataset: ShardedDataset,
    source: str,
    batch_samples: int,
    max_samples: int | None = None,
    limits: Sequence[int] = (),
    masking: Masking | None = None,
) -> Losses:
    """Losses of the targets in the first `max_samples` rows of a source, with all context and under each limit.

    With `masking` the targets are the tokens behind masks, as validation during training draws them; where it draws the
    share of masks, the losses are weighted and averaged over all tokens that might have been masked.
    """
    assert not (masking and limits), "documents that hold masks are not cut"
    row_tokens, device = dataset.manifest.seq_length, model.embed_tokens.weight.device
    count = min(dataset.rows_per_source[source], max_samples or dataset.rows_per_source[source])
    full, limited, gains = PositionSums(row_tokens), *({c: PositionSums(row_tokens) for c in limits} for _ in range(2))
    passes = 1 + len(limits)
    number = dataset.sources.index(source)
    before = sum(dataset.rows_per_source[name] for name in dataset.sources[:number])
    model.lm_head.loss.know([source])
    with Progress(source, count * passes * row_tokens * TOKEN_BYTES) as progress:
        for first in range(0, count, batch_samples):
            numbers = np.arange(first, min(first + batch_samples, count))
            batch = make_batch(dataset, np.full(len(numbers), number), numbers)
            tokens = len(numbers) * row_tokens
            if masking:
                full.add(*_masked(model, batch, masking, before + numbers), ahead=0)
                progress.advance(tokens * TOKEN_BYTES, tokens)
                continue
            place = batch["position_ids"].numpy(), batch["targets"].numpy() != NO_TARGET
            documents = Documents.from_position_ids(batch["position_ids"], device)
            inputs, targets = batch["input_ids"].to(device), batch["targets"].to(device)
            losses = token_losses(model, inputs, targets, documents)
            full.add(*place, losses)
            progress.advance(tokens * TOKEN_BYTES, tokens)
            for c in limits:
                without = token_losses(model, inputs, targets, in_chunks(documents, c))
                limited[c].add(*place, without)
                gains[c].add(*place, without - losses)
                progress.advance(tokens * TOKEN_BYTES, tokens)
    return Losses(full, limited, gains)


@torch.inference_mode()
def token_losses(model: Llama, input_ids: torch.Tensor, targets: torch.Tensor, documents: Documents) -> np.ndarray:
    """Cross-entropy of every target in nats, float64 [B, T]; the input may go on beyond the targets."""
    documents.route(None, model.config.adapters.members, torch.zeros(len(input_ids), dtype=torch.int64))
    hidden = model.hidden_states(input_ids, documents)[:, : targets.shape[1]]
    cross_entropy = partial(linear_cross_entropy, weight=model.lm_head.weight)
    return model.lm_head.loss.of_tokens(cross_entropy, hidden, documents, targets).double().cpu().numpy()


def _masked(
    model: Llama, batch: Batch, masking: Masking, samples: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Arrays [B, T] of `batch` with the masks of the rows numbered `samples`: places, which count, weighted losses."""
    places, eligible = batch["position_ids"].numpy(), masking.eligible(batch)
    batch = masking(batch, samples)
    device, columns = model.embed_tokens.weight.device, slice(places.shape[1])  # of the noised copy
    documents = Documents.from_position_ids(batch["position_ids"], device, batch["copies"])
    targets, weights = batch["targets"][:, columns], batch["target_weights"][:, columns].double().numpy()
    losses = weights * token_losses(model, batch["input_ids"].to(device), targets.to(device), documents)
    return places, eligible if masking.objective.drawn else targets.numpy() != NO_TARGET, losses


def default_limits(row_tokens: int) -> list[int]:
    """A sixteenth, an eighth, a quarter and half of a row."""
    return sorted({max(1, row_tokens // part) for part in (16, 8, 4, 2)})


def positions(losses: dict[str, Losses]) -> dict[str, Any]:
    """Of each source, the loss by position, JSON-able."""
    return {source: found.full.by_position("loss") for source, found in losses.items()}


def context_gain(losses: dict[str, Losses]) -> dict[str, Any]:
    """Of each source and limit, the loss under the limit and how much of it all context saves, JSON-able."""
    return {source: [_gain(found, limit) for limit in found.limited] for source, found in losses.items()}


def _gain(losses: Losses, limit: int) -> dict[str, Any]:
    gain = losses.gains[limit]
    loss = losses.limited[limit].overall("loss")["loss"]
    return {"limit": limit, "loss": loss} | gain.overall("gain") | {"positions": gain.by_position("gain")}
