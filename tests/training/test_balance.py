"""Rows are dealt out whole, once each, evenly, and by nothing but their cost."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.shards import open_split
from tests.model.tiny import tiny
from tests.training.corpus import build
from training.balance import deal, imbalance, row_costs
from training.data import make_batch

LAYOUT = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 4))  # accumulation, ranks, micro-batch


@given(LAYOUT, st.data())
def test_every_row_is_dealt_once(layout, data):
    accumulation, ranks, micro_batch = layout
    size = accumulation * ranks * micro_batch
    costs = np.array(data.draw(st.lists(st.integers(1, 10**6), min_size=size, max_size=size)))
    dealt = deal(costs, micro_batch, ranks)
    assert dealt.shape == (accumulation, ranks, micro_batch)
    assert sorted(dealt.ravel().tolist()) == list(range(size))
    total, expected = [0] * ranks, [[[] for _ in range(ranks)] for _ in range(accumulation)]
    order = sorted(range(size), key=lambda row: (-costs[row], row))
    for place, row in enumerate(order):
        group = expected[place // (ranks * micro_batch)]
        rank = min((r for r in range(ranks) if len(group[r]) < micro_batch), key=lambda r: (total[r], r))
        group[rank].append(row)
        total[rank] += costs[row]
    assert dealt.tolist() == expected


@given(LAYOUT, st.data())
def test_no_rank_has_more_than_the_average_and_the_spread_of_a_micro_batch(layout, data):
    """What greedy dealing guarantees: ranks differ by no more than the rows of one micro-batch can."""
    accumulation, ranks, micro_batch = layout
    size = accumulation * ranks * micro_batch
    costs = np.array(data.draw(st.lists(st.integers(1, 10**6), min_size=size, max_size=size)))
    totals = costs[deal(costs, micro_batch, ranks)].sum((0, 2))
    assert totals.max() - totals.min() <= micro_batch * (costs.max() - costs.min())


@given(st.integers(2, 4), st.integers(1, 3), st.integers(0, 100))
def test_dealing_beats_the_order_of_the_samples(ranks, micro_batch, seed):
    """Documents of very different lengths, many steps: on average much less waiting."""
    rng = np.random.default_rng(seed)
    plain, dealt = [], []
    for _ in range(20):
        costs = rng.choice([10, 30, 100, 1000], 4 * ranks * micro_batch)
        plain.append(imbalance(costs.reshape(4, ranks, micro_batch).sum((0, 2))))
        dealt.append(imbalance(costs[deal(costs, micro_batch, ranks)].sum((0, 2))))
    assert np.mean(dealt) < np.mean(plain)


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 5}, {"is_causal": False}])
def test_costs_are_the_visible_pairs_of_the_batch(tmp_path, changes):
    model = tiny(**changes)
    build(tmp_path, {"books": [*range(1, 40), 100, 7, 3]}, seq_length=16, overlap=3)
    dataset = open_split(tmp_path, "train")
    rows = np.arange(len(dataset))
    positions = make_batch(dataset, np.zeros_like(rows), rows)["position_ids"].numpy()
    expected = []
    for row in positions:
        lengths = np.diff([*np.flatnonzero(row == 0), len(row)])
        expected.append(sum(model.visibility.pairs(int(n)) for n in lengths))
    assert row_costs(dataset, np.zeros_like(rows), rows, model.visibility).tolist() == expected
