"""Where adapters begin that have to find out by themselves what they are for.

Adapters with B = 0 are the base, all of them: whichever learns a little first is best at everything, and takes all documents.
So some documents are grouped by what the base makes of them, the mean of its last hidden states (k-means), and each adapter
begins with a few steps on one group; from then on likelihoods decide. No document says where it is from. (Documents in groups
for an expert each: Gururangan et al. 2023, cluster-branch-train-merge, by words there.)

Legend: D documents, M width, N groups.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_prep.tokenizer import Tokenizer
from model.documents import Documents
from model.llama import Llama
from storage.atomic import write_atomically
from storage.shards import ShardedDataset
from training.data import make_batch

ROUNDS, BEGINNINGS = 50, 8
LEAST_TOKENS = 64
"""Of a piece of a document whose mean says something."""


def groups_of(points: Tensor, groups: int, generator: np.random.Generator) -> Tensor:
    """int64 [D]: k-means of the directions of `points` [D, M] from their mean, each column over its deviation first.

    The best of several beginnings, far apart as in Arthur and Vassilvitskii 2007 (k-means++).
    """
    points = (points - points.mean(0)) / points.std(0).clamp_min(1e-12)
    points = points / points.norm(dim=1, keepdim=True).clamp_min(1e-12)
    best, least = torch.zeros(len(points), dtype=torch.int64), float("inf")
    for _ in range(BEGINNINGS):
        centres = _far_apart(points, groups, generator)
        for _ in range(ROUNDS):
            nearest = torch.cdist(points, centres).argmin(1)
            counts = nearest.bincount(minlength=groups)[:, None]
            means = torch.zeros_like(centres).index_add_(0, nearest, points) / counts.clamp_min(1)
            centres = torch.where(counts > 0, means, centres)
        distances = torch.cdist(points, centres)
        if (total := float(distances.min(1).values.square().sum())) < least:
            best, least = distances.argmin(1), total
    return best


def _far_apart(points: Tensor, groups: int, generator: np.random.Generator) -> Tensor:
    chosen = [int(generator.integers(len(points)))]
    while len(chosen) < groups:
        squares = torch.cdist(points, points[chosen]).square().min(1).values.double().numpy()
        chosen.append(int(generator.choice(len(points), p=squares / squares.sum())))
    return points[chosen]


@torch.inference_mode()
def states(model: Llama, dataset: ShardedDataset, rows: np.ndarray) -> tuple[Tensor, list[list[int]]]:
    """Of the pieces of documents in some rows, by their places in all of the split: mean hidden states [D, M] and tokens."""
    bounds = np.cumsum([0, *(dataset.rows_per_source[name] for name in dataset.sources)])
    means, pieces = [], []
    for chosen in np.array_split(rows, -(-len(rows) // 32)):
        sources = np.searchsorted(bounds, chosen, side="right") - 1
        batch = make_batch(dataset, sources, chosen - bounds[sources])
        documents = Documents.from_position_ids(batch["position_ids"])
        hidden = model.hidden_states(batch["input_ids"], documents).flatten(0, 1).split(documents.lengths)
        for state, ids in zip(hidden, batch["input_ids"].flatten().split(documents.lengths), strict=True):
            if len(ids) >= LEAST_TOKENS and len(ids.unique()) > 1:  # else it is padding
                means.append(state.mean(0))
                pieces.append(ids.tolist())
    return torch.stack(means), pieces


def write_groups(
    model: Llama, tokenizer: Tokenizer, dataset: ShardedDataset, names: list[str], rows: int, seed: int, folder: Path
) -> list[Path]:
    """A file of documents for each of the names, from so many random rows of the split."""
    generator = np.random.default_rng(seed)
    total = sum(dataset.rows_per_source.values())
    points, pieces = states(model, dataset, generator.choice(total, min(rows, total), replace=False))
    of_pieces = groups_of(points, len(names), generator).tolist()
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.jsonl" for name in names]
    for number, file in enumerate(files):
        texts = [tokenizer.decode(ids) for ids, group in zip(pieces, of_pieces, strict=True) if group == number]
        lines = (json.dumps({"id": f"{number}/{i}", "text": text}, ensure_ascii=False) for i, text in enumerate(texts))
        write_atomically(file, "".join(f"{line}\n" for line in lines).encode())
    return files
