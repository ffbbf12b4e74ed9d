"""Shares of adapters learned by gradient descent on what their weighted sum costs (LoRA Soups, Prabhakar et al. 2024)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from console.progress import Progress
from model.merging import combined
from storage.shards import ShardedDataset
from tools.evaluation.domains import AdaptedBase, Sample
from tools.evaluation.long_context import TOKEN_BYTES
from training.data import NO_TARGET

STEPS = 40
LEARNING_RATE = 0.05
"""Of Adam, at the first step; it falls to 0 in a line."""


def learned_shares(
    adapted: AdaptedBase,
    dataset: ShardedDataset,
    sample: Sample,
    start: Mapping[str, float],
    by_layer: bool,
    batch_samples: int = 4,
) -> dict[str, Tensor]:
    """What each adapter of `start` counts in the way `cat`: one number, or `by_layer` one for each adapted block.

    Each step takes rows of every source, of which the mean loss counts once; after the last batch comes the first.
    """
    model, like = adapted.merged("cat", start), adapted.base["embed_tokens.weight"]
    layers = len(adapted.adapters.adapted_layers(adapted.config.num_hidden_layers))
    shape = (layers,) if by_layer else ()
    shares = {name: torch.full(shape, float(share), requires_grad=True) for name, share in start.items()}
    optimizer = torch.optim.Adam(shares.values(), lr=LEARNING_RATE)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    rows = [
        itertools.cycle(list(itertools.islice(sample.batches(dataset, source, batch_samples), STEPS)))
        for source in dataset.sources
    ]
    most = STEPS * len(rows) * batch_samples * dataset.manifest.seq_length * TOKEN_BYTES
    with Progress("learning weights", most) as progress:
        for _ in range(STEPS):
            optimizer.zero_grad()
            for batches in rows:
                batch = next(batches)
                _, state = combined(adapted.adapters, adapted.state, "cat", shares)
                ids, targets = batch["input_ids"].to(like.device), batch["targets"].to(like.device)
                total, _ = torch.func.functional_call(
                    model,
                    {name: tensor.to(like) for name, tensor in state.items()},
                    (ids, batch["position_ids"], targets),
                    {"adapters": torch.zeros(len(ids), dtype=torch.int64, device=like.device)},
                )
                (total / (targets != NO_TARGET).sum() / len(rows)).backward()
                progress.advance(ids.numel() * TOKEN_BYTES, ids.numel())
            optimizer.step()
            falling.step()
    return {name: share.detach() for name, share in shares.items()}
