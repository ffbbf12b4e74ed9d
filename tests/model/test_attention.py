"""Attention equals its formula in float64, inside documents, with gradients, and with memory linear in T."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.attention import attend, attend_cached
from model.documents import Documents
from tests.model.support import TensorSizes, formula, positions


def qkv(rows, tokens, heads=4, kv_heads=2, width=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, tokens, h, width) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@st.composite
def rows_of_documents(draw) -> list[list[int]]:
    """One to three rows of equal length, each cut into documents."""
    tokens = draw(st.integers(1, 24))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        cuts = sorted(draw(st.sets(st.integers(1, tokens - 1), max_size=5))) if tokens > 1 else []
        rows.append([b - a for a, b in zip([0, *cuts], [*cuts, tokens], strict=True)])
    return rows


@given(
    rows=rows_of_documents(),
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1), (3, 1)]),
    window=st.one_of(st.none(), st.integers(1, 26)),
)
def test_values_and_gradients_equal_the_formula(rows, heads, window):
    q, k, v = qkv(len(rows), sum(rows[0]), *heads)
    lengths = [n for row in rows for n in row]
    expected = formula(q, k, v, lengths, window).view_as(q)
    found = attend(q, k, v, Documents.from_position_ids(positions(*rows)), window)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    upstream = torch.randn(q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected_grads = torch.autograd.grad(expected, (q, k, v), upstream)
    grads = torch.autograd.grad(found, (q, k, v), upstream)
    torch.testing.assert_close(grads, expected_grads, atol=1e-11, rtol=1e-11)


@given(rows=rows_of_documents())
def test_documents_are_read_from_the_positions(rows):
    documents = Documents.from_position_ids(positions(*rows))
    lengths = [n for row in rows for n in row]
    assert documents.lengths == lengths
    assert documents.max_length == max(lengths)
    assert documents.cu_seqlens.dtype == torch.int32
    assert documents.cu_seqlens.diff().tolist() == lengths
    expected = torch.tensor(lengths).repeat_interleave(torch.tensor(lengths)).view(len(rows), -1)
    assert torch.equal(documents.length_of_each_token(), expected)


def test_a_row_that_starts_inside_a_document_is_still_a_boundary():
    documents = Documents.from_position_ids(torch.tensor([[0, 1, 2], [7, 8, 0]]))
    assert documents.lengths == [3, 2, 1]


@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_one_token_over_the_cache_is_the_last_row_of_the_whole(window):
    q, k, v = qkv(2, 20)
    whole = attend(q, k, v, Documents.whole_rows(2, 20), window)
    torch.testing.assert_close(attend_cached(q[:, -1:], k, v, window), whole[:, -1:])


@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_grows_linearly_with_the_row(dtype, heads, window):
    def largest(rows):
        q, k, v = qkv(len(rows), sum(rows[0]), *heads, dtype=dtype)
        with TensorSizes() as sizes:
            attend(q, k, v, Documents.from_position_ids(positions(*rows)), window).sum().backward()
        return sizes.largest

    for shape in ([512], [200, 56, 256]):
        small, large = largest([shape]), largest([[4 * n for n in shape]])
        assert large <= 4 * small
        assert large < (4 * 512) ** 2 / 8
