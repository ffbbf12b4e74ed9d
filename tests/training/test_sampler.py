"""The order of samples: pure, rank-free, exact in its mixture and its epochs."""

import tracemalloc
from collections import Counter
from math import factorial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.sampler import WEIGHT_BITS, SampleOrder, permute

ROWS = st.dictionaries(st.sampled_from("abcde"), st.integers(1, 300), min_size=1)


@st.composite
def orders(draw) -> SampleOrder:
    rows = draw(ROWS)
    weights = {name: draw(st.floats(0.001, 10)) for name in rows} if draw(st.booleans()) else {}
    return SampleOrder(rows, weights, draw(st.text(max_size=4)), draw(st.integers(0, 5)))


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(size, key):
    image = permute(np.arange(size), size, np.full(size, key, np.uint64))
    assert sorted(image.tolist()) == list(range(size))


def test_all_permutations_of_few_rows_are_about_equally_likely():
    keys = np.random.default_rng(0).integers(0, 2**63, 20_000).astype(np.uint64)
    for size in (2, 3, 4):
        images = np.stack([permute(np.full(len(keys), i), size, keys) for i in range(size)], 1)
        counts = np.array(list(Counter(map(tuple, images.tolist())).values()))
        assert len(counts) == factorial(size)
        assert np.abs(counts / counts.mean() - 1).max() < 0.1


def test_neighbours_are_scattered():
    image = permute(np.arange(100_000), 100_000, np.full(100_000, 9, np.uint64))
    assert abs(np.corrcoef(np.arange(100_000), image)[0, 1]) < 0.02
    assert abs(np.corrcoef(image[1:], image[:-1])[0, 1]) < 0.02


@given(orders(), st.integers(0, 5))
def test_epochs_are_permutations_and_differ(order, seed):
    sources, rows, epochs = order.locate_many(np.arange(8192))
    for s, size in enumerate(order.rows):
        drawn, epoch = rows[sources == s], epochs[sources == s]
        assert (np.bincount(epoch)[:-1] == size).all()
        lists = [drawn[epoch == e].tolist() for e in range(len(drawn) // size)]
        assert all(sorted(one) == list(range(size)) for one in lists)
        if size > 20:
            assert len(set(map(tuple, lists))) == len(lists)


@given(orders(), st.integers(1, 12))
def test_mixture_is_within_one_sample_of_its_share_after_every_block(order, blocks):
    block = 1 << order._block_bits
    share = np.diff(order._ends) / (1 << WEIGHT_BITS)
    sources, _, _ = order.locate_many(np.arange(min(blocks * block, 1 << 16)))
    for end in range(block, len(sources) + 1, block):
        given_ = np.bincount(sources[:end], minlength=len(share))
        assert np.abs(given_ - share * end).max() < 1


@given(st.dictionaries(st.sampled_from("abcde"), st.floats(0.0001, 1e6), min_size=1))
def test_shares_are_the_weights(weights):
    order = SampleOrder(dict.fromkeys(weights, 1), weights, "", 0)
    exact = np.array([weights[name] for name in order.sources]) / sum(weights.values())
    assert order._ends[-1] == 1 << WEIGHT_BITS
    assert np.abs(np.diff(order._ends) / (1 << WEIGHT_BITS) - exact).max() <= len(weights) / (1 << WEIGHT_BITS)


@given(orders(), st.lists(st.integers(0, 10**12), min_size=1, max_size=30))
def test_a_sample_does_not_depend_on_what_else_is_asked(order, ks):
    sources, rows, epochs = order.locate_many(np.array(ks))
    for k, source, row, epoch in zip(ks, sources, rows, epochs, strict=True):
        assert order.locate(k) == (order.sources[source], row, epoch)
        assert 0 <= row < order.rows[source]


def test_fingerprint_seed_weights_and_rows_select_the_order():
    def order(rows=None, weights=None, fingerprint="f", seed=0):
        return SampleOrder(rows or {"a": 500, "b": 500}, weights or {"a": 1.0, "b": 1.0}, fingerprint, seed)

    def rows(one):
        return [array.tolist() for array in one.locate_many(np.arange(2000))[:2]]

    base = order()
    assert order(weights={"a": 2.0, "b": 2.0}).digest == base.digest
    assert rows(order(weights={"a": 2.0, "b": 2.0})) == rows(base)
    others = [
        order(fingerprint="g"),
        order(seed=1),
        order(weights={"a": 1, "b": 2.0}),
        order(rows={"a": 500, "b": 501}),
    ]
    for other in others:
        assert other.digest != base.digest
        assert rows(other) != rows(base)


def test_sources_do_not_share_a_permutation():
    sources, rows, _ = SampleOrder({"a": 400, "b": 400}, {}, "f", 0).locate_many(np.arange(800))
    assert rows[sources == 0].tolist() != rows[sources == 1].tolist()


def test_weight_zero_leaves_a_source_out_even_an_empty_one():
    order = SampleOrder({"a": 5, "b": 7, "empty": 0}, {"a": 0.0, "b": 1.0, "empty": 0.0}, "f", 0)
    assert order.sources == ["b"]
    assert {order.locate(k)[0] for k in range(50)} == {"b"}


@pytest.mark.parametrize(
    ("rows", "weights", "sentence"),
    [
        ({"a": 1, "b": 1}, {"c": 1.0}, "unknown source 'c': the data has a, b"),
        ({"a": 1, "b": 1}, {"a": 1.0}, "source 'b' has no weight"),
        ({"a": 1, "b": 1}, {"a": 1.0, "b": -1.0}, "must not be negative"),
        ({"a": 1}, {"a": 0.0}, "at least one must be positive"),
        ({"a": 1, "b": 0}, {"a": 1.0, "b": 1.0}, "source 'b' has a weight but no rows"),
        ({"a": 1, "b": 1}, {"a": 1.0, "b": float("nan")}, "must be finite"),
    ],
)
def test_impossible_mixtures_are_refused(rows, weights, sentence):
    with pytest.raises(ValueError, match=sentence):
        SampleOrder(rows, weights, "f", 0)


def test_a_trillion_rows_cost_no_memory():
    tracemalloc.start()
    order = SampleOrder({"a": 10**12, "b": 10**9}, {"a": 3.0, "b": 1.0}, "f", 0)
    _, rows, _ = order.locate_many(np.arange(10**13, 10**13 + 64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(rows.tolist())) == 64
    assert peak < 1 << 20
