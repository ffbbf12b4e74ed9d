"""Which tokens of their rows the ranks of a sequence group take, so that all have as many and about as much attention.

A row is cut into equal stretches. At first every rank has neighbouring ones, of which few keys go to other ranks; then the
busiest rank exchanges stretches with another, those that leave fewest documents divided, until no rank has more than
`ENOUGH` beyond the average. Of several numbers of stretches the one that divides least is taken. All of it follows from
the lengths of the documents, which every rank knows.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.layout.mesh import Mesh
from model.documents import Documents
from model.visibility import Visibility
from training.balance import deal, imbalance

STRETCHES = (8, 16, 32)
"""Of a row, for each rank: numbers to try, or lower ones into which the row divides."""
FEW = 256
"""Stretches of a row up to which a further number is tried when one is even enough: it takes milliseconds."""
ENOUGH = 0.01
"""How much more attention than the average the busiest rank may have."""


def columns_here(documents: Documents, visibility: Visibility, mesh: Mesh) -> slice | Tensor:
    """Which columns of a batch of whole rows this rank works on."""
    if mesh.exchange == "heads":
        return mesh.columns(sum(documents.lengths) // len(documents.position_ids))
    return dealt_columns(documents, visibility, mesh.sequence)[mesh.sequence_rank]


def pairs_here(documents: Documents, visibility: Visibility, mesh: Mesh) -> float:
    """Over how many (query, key) pairs of a batch of whole rows this rank attends, with all heads or its share of them."""
    if mesh.exchange == "heads":
        return float(visibility.pairs(np.array(documents.lengths)).sum()) / mesh.sequence
    return float(_deal_of(documents, visibility, mesh.sequence).pairs[mesh.sequence_rank])


def dealt_columns(documents: Documents, visibility: Visibility, ranks: int) -> list[Tensor]:
    """By rank: its columns of all rows of a batch, int64 [T / ranks] ascending. T must be a multiple of `ranks`."""
    owner = _deal_of(documents, visibility, ranks).owner
    tokens = sum(documents.lengths) // len(documents.position_ids)
    stretches = np.arange(tokens).reshape(len(owner), -1)
    return [torch.from_numpy(stretches[owner == rank].flatten()) for rank in range(ranks)]


class _Deal(NamedTuple):
    owner: np.ndarray
    """By stretch of the row: its rank."""
    pairs: np.ndarray
    """By rank: the (query, key) pairs of its columns, over all rows."""


def _deal_of(documents: Documents, visibility: Visibility, ranks: int) -> _Deal:
    return _dealt(tuple(documents.lengths), len(documents.position_ids), visibility, ranks)


@lru_cache(maxsize=256)  # all micro-batches of a step are surveyed before the first is computed, which asks again
def _dealt(lengths: tuple[int, ...], rows: int, visibility: Visibility, ranks: int) -> _Deal:
    keys, crossing = _keys_of_columns(lengths, rows, visibility)
    found: list[tuple[float, int, _Deal]] = []
    for most in STRETCHES:
        each = next(count for count in range(most, 0, -1) if len(keys) // ranks % count == 0)
        if ranks * each > FEW and any(excess == 0 for excess, *_ in found):
            break
        costs, edges = (of.reshape(ranks * each, -1) for of in (keys, crossing))
        costs, edges = costs.sum(1), edges[:, 0]
        evened = np.empty(len(costs), np.int64)
        evened[deal(costs, each, ranks)[0]] = np.arange(ranks)[:, None]
        for owner in (_exchanged(costs, edges, ranks), evened):
            pairs = np.bincount(owner, costs)
            excess = max(imbalance(pairs) - ENOUGH, 0.0)
            found.append((excess, int(edges[1:][owner[1:] != owner[:-1]].sum()), _Deal(owner, pairs)))
    return min(found, key=lambda each: each[:2])[2]


def _keys_of_columns(lengths: Sequence[int], rows: int, visibility: Visibility) -> tuple[np.ndarray, np.ndarray]:
    """Of each column, over all rows: the keys that its queries see, and how many of them belong to documents that lie on
    both sides of its left edge."""
    ends = np.cumsum(lengths)
    position = np.arange(ends[-1]) - (ends - lengths).repeat(lengths)
    keys = visibility.keys(position, np.repeat(lengths, lengths))
    crossing = keys * (position > 0)
    return keys.reshape(rows, -1).sum(0), crossing.reshape(rows, -1).sum(0)


def _exchanged(costs: np.ndarray, crossing: np.ndarray, ranks: int) -> np.ndarray:
    """By stretch: its rank. `crossing`: keys that are seen across the left edge of each stretch."""
    owner, mean = np.arange(ranks).repeat(len(costs) // ranks), costs.sum() / ranks
    edges, most = np.append(crossing, 0), max(crossing.max(), 1)
    for _ in range(4 * len(costs)):
        loads = np.bincount(owner, costs)
        busiest = loads.argmax()
        if loads[busiest] <= (1 + ENOUGH) * mean:
            break
        given, taken = np.flatnonzero(owner == busiest)[:, None], np.flatnonzero(owner != busiest)[None]
        other, less = owner[taken], costs[given] - costs[taken]
        highest = np.maximum(loads[busiest] - less, loads[other] + less)
        beside = np.concatenate([[-1], owner, [-1]])

        def divided(stretch: np.ndarray, rank: np.ndarray | np.integer, beside: np.ndarray = beside) -> np.ndarray:
            """Keys that are seen across the edges of a stretch if that rank has it."""
            left, right = beside[stretch] != rank, beside[stretch + 2] != rank
            return left * edges[stretch] + right * edges[stretch + 1]

        more = divided(given, other) + divided(taken, busiest) - divided(given, busiest) - divided(taken, other)
        score = 50 * np.maximum(highest / mean - 1 - ENOUGH, 0) + more / most
        score = np.where(highest < loads[busiest], score, np.inf)
        if np.isinf(score.min()):
            break
        i, j = np.unravel_index(score.argmin(), score.shape)
        owner[given[i, 0]], owner[taken[0, j]] = owner[taken[0, j]], busiest
    return owner
