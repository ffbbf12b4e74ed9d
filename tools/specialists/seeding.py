"""Where adapters begin that have to find out by themselves what they are for.

Adapters with B = 0 are the base, all of them: whichever learns a little first is best at everything, and takes all documents.
So some documents are grouped by the tokens that they consist of (k-means), and each adapter begins with a few steps on one
group; from then on likelihoods decide. No document says where it is from. (Documents in groups for an expert each: Gururangan
et al. 2023, cluster-branch-train-merge, by tf-idf of their words.)

Legend: D documents, V tokens that occur, N groups.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data_prep.tokenizer import Tokenizer
from model.documents import Documents
from storage.atomic import write_atomically
from storage.shards import ShardedDataset
from training.data import make_batch

ROUNDS, BEGINNINGS = 50, 8
LEAST_TOKENS = 64
"""Of a piece of a document whose frequencies say something."""


def groups_of(points: Tensor, groups: int, generator: np.random.Generator) -> Tensor:
    """int64 [D]: k-means of `points` [D, V]. The best of several beginnings, far apart as in Arthur and Vassilvitskii 2007
    (k-means++)."""
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


def frequencies(dataset: ShardedDataset, rows: np.ndarray) -> tuple[Tensor, list[list[int]]]:
    """Of the pieces of documents in some rows, by their places in all of the split: what share of them each token is, as square
    roots, so that distances are Hellinger's, float32 [D, V]; and their tokens."""
    bounds = np.cumsum([0, *(dataset.rows_per_source[name] for name in dataset.sources)])
    sources = np.searchsorted(bounds, rows, side="right") - 1
    batch = make_batch(dataset, sources, rows - bounds[sources])
    lengths = Documents.from_position_ids(batch["position_ids"]).lengths
    pieces = [
        ids
        for ids in batch["input_ids"].flatten().split(lengths)
        if len(ids) >= LEAST_TOKENS and len(ids.unique()) > 1  # else it is padding
    ]
    occur, columns = torch.cat(pieces).unique(return_inverse=True)
    counts = [part.bincount(minlength=len(occur)) for part in columns.split([len(ids) for ids in pieces])]
    shares = torch.stack(counts).float() / torch.tensor([len(ids) for ids in pieces])[:, None]
    return shares.sqrt(), [ids.tolist() for ids in pieces]


def write_groups(
    tokenizer: Tokenizer, dataset: ShardedDataset, names: list[str], rows: int, seed: int, folder: Path
) -> list[Path]:
    """A file of documents for each of the names, from so many random rows of the split."""
    generator = np.random.default_rng(seed)
    total = sum(dataset.rows_per_source.values())
    points, pieces = frequencies(dataset, generator.choice(total, min(rows, total), replace=False))
    of_pieces = groups_of(points, len(names), generator).tolist()
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.jsonl" for name in names]
    for number, file in enumerate(files):
        texts = [tokenizer.decode(ids) for ids, group in zip(pieces, of_pieces, strict=True) if group == number]
        lines = (json.dumps({"id": f"{number}/{i}", "text": text}, ensure_ascii=False) for i, text in enumerate(texts))
        write_atomically(file, "".join(f"{line}\n" for line in lines).encode())
    return files
