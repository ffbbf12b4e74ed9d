"""Which columns of rows the ranks of a sequence group take: every token once, with even attention, and few keys to send."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.balance import packed
from engine.layout import deal
from engine.layout.deal import dealt_columns, pairs_here
from engine.layout.mesh import Mesh
from engine.layout.sequence import plan_exchange
from model.documents import Documents
from model.visibility import Visibility
from tests.model.test_attention import what_may_be_visible
from tests.model.tiny import positions
from training.balance import imbalance


def documents_of(*rows: list[int]) -> Documents:
    return Documents.from_position_ids(positions(*rows))


def attention_of_ranks(documents: Documents, visibility: Visibility, ranks: int) -> np.ndarray:
    """By rank: the pairs of its queries and what these see."""
    meshes = [Mesh(rank, ranks, sequence=ranks, exchange="keys") for rank in range(ranks)]
    return np.array([pairs_here(documents, visibility, mesh) for mesh in meshes])


@given(
    ranks=st.integers(1, 8), each=st.integers(1, 12), about=st.integers(2, 40), copies=st.sampled_from([1, 2]),
    visibility=what_may_be_visible(), rows=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_column_is_dealt_once_and_all_ranks_have_as_many(ranks, each, about, copies, visibility, rows, seed):
    lengths = [packed(ranks * each, about, seed + row) * copies for row in range(rows)]
    documents = Documents.from_position_ids(positions(*lengths), copies=copies)
    columns = dealt_columns(documents, visibility, ranks)
    assert {len(of_rank) for of_rank in columns} == {copies * each}
    assert all(of_rank.tolist() == sorted(of_rank.tolist()) for of_rank in columns)
    assert sorted(torch.cat(columns).tolist()) == list(range(copies * ranks * each))
    if copies == 1 or visibility.window is None:
        total = attention_of_ranks(documents, visibility, ranks).sum()
        tokens = documents.tokens()
        assert total == visibility.sees(tokens.at((slice(None), None)), tokens).sum()


@pytest.mark.parametrize("about", [1024, 4096, 16384, 131072])
@pytest.mark.parametrize("visibility", [Visibility(), Visibility(1, 4096), Visibility(512)])
def test_the_busiest_rank_has_little_more_than_the_average(about, visibility):
    for seed in range(5):
        documents = documents_of(packed(131072, about, seed))
        assert imbalance(attention_of_ranks(documents, visibility, 8)) <= 0.02


def test_rows_of_a_batch_are_evened_together():
    documents = documents_of(*(packed(16384, 2048, seed) for seed in range(4)))
    assert imbalance(attention_of_ranks(documents, Visibility(), 8)) <= 0.02


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_few_keys_of_short_documents_are_sent(ranks):
    """Beside a gather, in which every rank sends its keys to all others."""
    visibility = Visibility()
    for seed in range(10):
        documents = documents_of(packed(32768, 1024, seed))
        columns = dealt_columns(documents, visibility, ranks)
        plans = [plan_exchange(documents, visibility, columns, r, torch.device("cpu")) for r in range(ranks)]
        sent = sum(len(places) for plan in plans for places in plan.sent)
        assert sum(sum(plan.received) for plan in plans) == sent > 0
        assert imbalance(attention_of_ranks(documents, visibility, ranks)) <= 0.02
        assert sent < 0.05 * (ranks - 1) * 32768


def test_documents_that_divide_evenly_are_not_divided():
    documents = documents_of([1024] * 32)
    columns = dealt_columns(documents, Visibility(), 8)
    assert [of_rank.tolist() for of_rank in columns] == torch.arange(32768).view(8, -1).tolist()
    assert plan_exchange(documents, Visibility(), columns, 3, torch.device("cpu")).silent


def test_the_micro_batches_of_a_step_are_dealt_once():
    """The survey of a step asks for all of them before the first is computed."""
    batches = [documents_of(packed(512, 64, seed)) for seed in range(40)]
    mesh = Mesh(1, 4, sequence=4, exchange="keys")
    before = deal._dealt.cache_info().misses
    for batch in batches:
        pairs_here(batch, Visibility(), mesh)
    for batch in batches:
        dealt_columns(batch, Visibility(), 4)
    assert deal._dealt.cache_info().misses == before + len(batches)
