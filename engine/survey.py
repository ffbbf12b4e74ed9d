"""What is in the micro-batches of a step, over all ranks, and what each target counts by it."""

from typing import Any, NamedTuple

import numpy as np
import torch

from engine.engine import Engine, documents_of
from engine.layout.deal import pairs_here
from model.adapter_config import AdaptersConfig
from training.balance import imbalance
from training.batch import Batch
from training.objective import NO_TARGET


class Survey(NamedTuple):
    targets: int
    """Valid ones over all ranks, those of a row once however many ranks work on it."""
    attention_imbalance: float
    """How unevenly attention is spread over the ranks that have other tokens (see `training.balance.imbalance`)."""
    of_adapters: dict[str, int]
    """Of the valid targets, by the adapter of their row; empty where there are no adapters."""


def prepare(engine: Engine, batches: list[Batch]) -> tuple[Survey, list[Batch]]:
    """What is in the micro-batches of a step, which get their adapters where these are chosen by documents, and weights where
    each adapter has a mean loss of its own."""
    if engine.config.adapters.mode == "hard" and engine.config.adapters.names:
        batches = engine.choose(batches)
    found = survey(engine, batches)
    return found, [weighed(batch, found.of_adapters) for batch in batches]


def survey(engine: Engine, batches: list[Batch]) -> Survey:
    """What is in the batches of all ranks."""
    mesh, names = engine.mesh, engine.config.adapters.names if "adapters" in batches[0] else ()
    counts = np.zeros(1 + len(names))
    pairs = np.zeros(mesh.data * mesh.sequence)
    for batch in batches:
        counts[0] += batch["num_targets"]
        if names:
            counted = batch["targets"] != NO_TARGET
            weights = counted if batch["adapters"].dim() == 2 else counted.sum(1)
            counts[1:] += np.bincount(batch["adapters"].flatten(), weights.flatten(), minlength=len(names))
        pairs[mesh.data_rank * mesh.sequence + mesh.sequence_rank] += pairs_here(
            documents_of(batch), engine.visibility, mesh
        )
    totals = engine.sum_over_tokens([*counts / mesh.sequence, *pairs])
    targets, *of_adapters = (round(total) for total in totals[: len(counts)])
    return Survey(targets, imbalance(np.array(totals[len(counts) :])), dict(zip(names, of_adapters, strict=True)))


def weighed(batch: Batch, of_adapters: dict[str, int]) -> Batch:
    """With what each target counts, so that the mean over all targets becomes the sum of the adapters' own means.

    Not where documents have chosen their adapters: then likelihoods of the same model are compared.
    """
    if len(of_adapters) < 2 or batch["adapters"].dim() == 2:
        return batch
    of_each = torch.tensor(list(of_adapters.values()), dtype=torch.float64)
    weights = (of_each.sum() / of_each.clamp(min=1)).float()[batch["adapters"]]
    return batch | {"target_weights": weights[:, None].expand(batch["targets"].shape)}


def figures(adapters: AdaptersConfig, found: Survey, sums: list[float]) -> dict[str, Any]:
    """What a step says of the adapters, by the names of metrics; `sums`: those of `HeadLoss` for each, over all ranks."""
    parts = zip(found.of_adapters.items(), sums, strict=True) if found.of_adapters else ()
    losses = {name: total / count for (name, count), total in parts if count}
    of_losses = {"adapter_losses": losses} if losses else {}
    if not adapters.members:
        return of_losses
    made = np.array([*found.of_adapters.values()] or sums, float)
    shares = made / max(made.sum(), 1e-300)
    effective = float(np.exp(-(shares * np.log(np.maximum(shares, 1e-300))).sum()))
    named = dict(zip(adapters.names, shares.tolist(), strict=True))
    return of_losses | {"adapter_shares": named, "effective_adapters": effective}
