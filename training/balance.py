"""Which rank gets which row of a step, so that all ranks have about as much attention to compute.

Rows have equally many tokens, but one long document costs more attention than many short ones. Ranks wait for each other
after every step, and under ZeRO-3 or a pipeline in every micro-batch, so the slowest decides. The rows of a step are
therefore dealt out by cost. A step as a whole keeps its rows: which these are stays a pure function of the sample numbers.
"""

import heapq

import numpy as np

from model.visibility import Visibility
from storage.shards import ShardedDataset


def row_costs(dataset: ShardedDataset, sources: np.ndarray, rows: np.ndarray, visibility: Visibility) -> np.ndarray:
    """Visible (query, key) pairs in each row, int64 [n]; padding counts, since it is computed."""
    lengths = [lengths_of_row(dataset, *place) for place in zip(sources.tolist(), rows.tolist(), strict=True)]
    begins = np.cumsum([0] + [len(each) for each in lengths[:-1]])
    return np.add.reduceat(visibility.pairs(np.concatenate(lengths)), begins)


def lengths_of_row(dataset: ShardedDataset, source: int, row: int) -> np.ndarray:
    """Tokens of each document as far as a row has them as inputs, and of the padding if there is some; int64."""
    lengths = dataset.pieces(source, row).seg_len.astype(np.int64)
    rest = dataset.manifest.seq_length - int(lengths.sum())
    if rest > 0:
        return np.append(lengths, rest)
    lengths[-1] += rest  # the last token of a full row is a target only
    return lengths


def deal(costs: np.ndarray, micro_batch: int, world_size: int) -> np.ndarray:
    """Indices into `costs` for each rank and micro-batch: int64 [accumulation, world_size, micro_batch], each used once.

    The most expensive rows share the first micro-batches, so that ranks in step with each other have rows alike; within
    them every row goes to the rank that has had the least so far (Graham 1969, longest processing time first).
    """
    accumulation = len(costs) // (micro_batch * world_size)
    assert accumulation * micro_batch * world_size == len(costs)
    order = np.argsort(-costs, kind="stable").reshape(accumulation, world_size * micro_batch)
    dealt = np.empty((accumulation, world_size, micro_batch), np.int64)
    total = [0] * world_size
    for group, out in zip(order, dealt, strict=True):
        filled = [0] * world_size
        least = [(total[rank], rank) for rank in range(world_size)]  # of the ranks that take more of this group
        heapq.heapify(least)
        for row, cost in zip(group.tolist(), costs[group].tolist(), strict=True):
            _, rank = heapq.heappop(least)
            out[rank, filled[rank]] = row
            filled[rank] += 1
            total[rank] += cost
            if filled[rank] < micro_batch:
                heapq.heappush(least, (total[rank], rank))
    return dealt


def imbalance(cost_of_ranks: np.ndarray) -> float:
    """How much more the busiest rank has to do than the average one, as a share: 0 when all have the same."""
    return float(cost_of_ranks.max() / cost_of_ranks.mean() - 1)
