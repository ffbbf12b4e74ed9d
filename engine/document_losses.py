"""The loss of each document of some batches, in any layout."""

from typing import Any

import torch
import torch.distributed as dist

from engine.engine import Engine, documents_of
from training.batch import Batch
from training.spikes import DocumentLoss


def document_losses(engine: Engine, batches: list[Batch]) -> list[DocumentLoss]:
    """Of all documents with targets in the batches of all ranks, by sample and place in it. Collective over all ranks."""
    plain = [batch.copy() for batch in batches]
    for batch in plain:
        batch.pop("seeds", None)  # nothing is dropped here
    engine.head_loss.of_documents = True
    try:
        found = engine.sums(plain)
    finally:
        engine.head_loss.of_documents = False
    here: dict[tuple[int, int], tuple[float, float]] = {}
    if engine.mesh.counts:
        for batch, sums in zip(plain, found, strict=True):
            totals, targets = sums.cpu().view(2, -1).tolist()
            here |= zip(_places(batch), zip(totals, targets, strict=True), strict=True)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, here)
    whole: dict[tuple[int, int], tuple[float, float]] = {}
    for part in parts:  # under sequence parallelism several ranks have a part of each
        for place, (total, targets) in part.items():
            before = whole.get(place, (0.0, 0.0))
            whole[place] = before[0] + total, before[1] + targets
    return [DocumentLoss(*place, total, round(targets)) for place, (total, targets) in sorted(whole.items()) if targets]


def _places(batch: Batch) -> list[tuple[int, int]]:
    """Sample and place in it of each document of a batch, or of each pair, in their order."""
    samples = batch["samples"].tolist()
    if "pairs" in batch:
        return [(samples[row], place) for row, place in batch["pairs"].tolist()]
    documents = documents_of(batch)
    width = batch["position_ids"].shape[1]
    rows = torch.tensor(documents.lengths).cumsum(0).sub(1).div(width, rounding_mode="floor").tolist()
    places, seen = [], dict[int, int]()
    for row in rows:
        places.append((samples[row], seen.get(row, 0)))
        seen[row] = seen.get(row, 0) + 1
    return places
