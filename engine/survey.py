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
    """Of the valid targets, by their adapter; empty where they have none."""
    by_source: list[int]
    """The same, [sources, adapters] flattened; empty where adapters are not chosen by documents."""


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
    sources = len(engine.head_loss.sources) if "sources" in batches[0] else 1
    counts = np.zeros(1 + sources * len(names))
    pairs = np.zeros(mesh.data * mesh.sequence)
    for batch in batches:
        counts[0] += batch["num_targets"]
        if names:
            counted, places = batch["targets"] != NO_TARGET, batch["adapters"]
            if places.dim() == 2:
                places = batch["sources"][:, None] * len(names) + places
            else:
                counted = counted.sum(1)
            counts[1:] += np.bincount(places.flatten(), counted.flatten(), minlength=len(counts) - 1)
        pairs[mesh.data_rank * mesh.sequence + mesh.sequence_rank] += pairs_here(
            documents_of(batch), engine.visibility, mesh
        )
    totals = engine.sum_over_tokens([*counts / mesh.sequence, *pairs])
    targets, *of_adapters = (round(total) for total in totals[: len(counts)])
    by_adapter = np.array(of_adapters, int).reshape(sources, -1).sum(0).tolist()
    named = dict(zip(names, by_adapter, strict=True))
    return Survey(targets, imbalance(np.array(totals[len(counts) :])), named, of_adapters if sources > 1 else [])


def weighed(batch: Batch, of_adapters: dict[str, int]) -> Batch:
    """With what each target counts, so that the mean over all targets becomes the sum of the adapters' own means.

    Not where documents have chosen their adapters: then likelihoods of the same model are compared.
    """
    if len(of_adapters) < 2 or batch["adapters"].dim() == 2:
        return batch
    of_each = torch.tensor(list(of_adapters.values()), dtype=torch.float64)
    weights = (of_each.sum() / of_each.clamp(min=1)).float()[batch["adapters"]]
    return batch | {"target_weights": weights[:, None].expand(batch["targets"].shape)}


def figures(engine: Engine, found: Survey, sums: list[float]) -> dict[str, Any]:
    """What a step says of the adapters, by the names of metrics; `sums`: those of `HeadLoss` for them, over all ranks."""
    adapters, sources = engine.config.adapters, engine.head_loss.sources
    if engine.head_loss.contrast is not None:
        return {}
    parts = zip(found.of_adapters.items(), sums, strict=True) if found.of_adapters else ()
    losses = {name: total / count for (name, count), total in parts if count}
    of_losses = {"adapter_losses": losses} if losses else {}
    if not adapters.members:
        return of_losses
    made = np.array(found.by_source or [*found.of_adapters.values()] or sums[: max(len(sources), 1) * adapters.members])
    rows = dict(zip(sources, made.reshape(-1, adapters.members), strict=False))
    shares = _shares(made.reshape(-1, adapters.members).sum(0))
    effective = float(np.exp(-(shares * np.log(np.maximum(shares, 1e-300))).sum()))
    figures = of_losses | {"adapter_shares": _by_name(adapters, shares), "effective_adapters": effective}
    if len(rows) > 1:
        seen = {source: _by_name(adapters, _shares(row)) for source, row in rows.items() if row.sum()}
        figures["adapter_shares_of_sources"] = seen
    if engine.prior:
        prior = [_by_name(adapters, np.array(row)) for row in engine.head_loss.prior.table]
        named = dict(zip(adapters.prior_sources, prior, strict=True)) if adapters.prior_sources else prior[0]
        figures["adapter_prior"] = named
    return figures


def _shares(made: np.ndarray) -> np.ndarray:
    return made / max(made.sum(), 1e-300)


def _by_name(adapters: AdaptersConfig, values: np.ndarray) -> dict[str, float]:
    return dict(zip(adapters.names, values.tolist(), strict=True))
