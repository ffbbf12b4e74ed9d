"""Attention equals its formula in float64 for all that may be visible, with gradients, and with memory linear in T."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model import block_attention
from model.attention import _attend_flex, attend, attend_cached
from model.documents import Documents
from model.visibility import Visibility
from tests.model.tiny import TensorSizes, formula, positions


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


def both_copies(rows):
    """Documents of rows that hold a noised and a clean copy of the same documents."""
    return Documents.from_position_ids(positions(*(row + row for row in rows)), copies=2)


def what_may_be_visible():
    """Causal with and without a window, chunked, bidirectional; windows are for the causal mask."""
    causal = st.builds(Visibility, st.just(1), st.one_of(st.none(), st.integers(1, 26)))
    return st.one_of(causal, st.builds(Visibility, st.one_of(st.none(), st.integers(2, 30)), st.none()))


@given(
    rows=rows_of_documents(),
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1), (3, 1)]),
    visibility=what_may_be_visible(),
    copies=st.booleans(),
    block_tokens=st.sampled_from([1, 8, 128]),
)
def test_values_and_gradients_equal_the_formula(rows, heads, visibility, copies, block_tokens):
    copies = copies and visibility.window is None
    documents = both_copies(rows) if copies else Documents.from_position_ids(positions(*rows))
    q, k, v = qkv(*documents.position_ids.shape, *heads)
    expected = formula(q, k, v, documents, visibility)
    with mock.patch.object(block_attention, "BLOCK_TOKENS", block_tokens):
        found = attend(q, k, v, documents, visibility)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    upstream = torch.randn(q.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected_grads = torch.autograd.grad(expected, (q, k, v), upstream)
    grads = torch.autograd.grad(found, (q, k, v), upstream)
    torch.testing.assert_close(grads, expected_grads, atol=1e-11, rtol=1e-11)


@given(rows=rows_of_documents(), visibility=what_may_be_visible(), copies=st.booleans())
def test_flex_attention_equals_the_formula(rows, visibility, copies):
    documents = both_copies(rows) if copies else Documents.from_position_ids(positions(*rows))
    q, k, v = (x.detach().float() for x in qkv(*documents.position_ids.shape, width=16))
    found = _attend_flex(q, k, v, documents, visibility)
    torch.testing.assert_close(found, formula(q, k, v, documents, visibility), atol=1e-5, rtol=1e-5)


@given(rows=rows_of_documents(), visibility=what_may_be_visible(), copies=st.booleans())
def test_visibility_follows_from_document_position_and_chunk(rows, visibility, copies):
    documents = both_copies(rows) if copies else Documents.from_position_ids(positions(*rows))
    tokens = documents.tokens()
    seen = visibility.sees(tokens.at((slice(None), None)), tokens).tolist()
    size = visibility.span or 10**9
    # every token of the flattened rows as (row, document of the row, position, whether noised)
    places = []
    for number, row in enumerate(rows):
        for noised in (True, False) if copies else (False,):
            places += [(number, d, p, noised) for d, length in enumerate(row) for p in range(length)]
    for i, (*document, p, noised) in enumerate(places):
        for j, (*other, other_p, other_noised) in enumerate(places):
            chunk, other_chunk = p // size, other_p // size
            expected = document == other and (visibility.window is None or p - other_p < visibility.window)
            if noised and not other_noised:
                expected = expected and other_chunk < chunk
            elif noised:
                expected = expected and other_chunk == chunk
            else:
                expected = expected and other_chunk <= chunk and not other_noised
            assert seen[i][j] == expected


@given(st.integers(1, 40), what_may_be_visible(), st.sampled_from([1, 2]))
def test_visible_pairs_are_counted(tokens, visibility, copies):
    if copies == 2:
        visibility = visibility._replace(window=None)
    documents = Documents.from_position_ids(positions([tokens] * copies), copies=copies)
    of_token = documents.tokens()
    seen = visibility.sees(of_token.at((slice(None), None)), of_token)
    assert copies * visibility.pairs(tokens) == seen.sum()
    assert torch.equal(visibility.keys(of_token.position, tokens), seen.sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("span", [None, 48, 200])
def test_reduced_precision_stays_near_the_formula(dtype, span):
    documents = both_copies([[300, 84], [128, 256]])
    q, k, v = qkv(*documents.position_ids.shape, width=16, dtype=dtype)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    found, expected = (attend(q, k, v, documents, Visibility(span)), formula(*exact, documents, Visibility(span)))
    bound = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found.double(), expected, atol=bound, rtol=bound)
    grads = torch.autograd.grad(found.sum(), (q, k, v))
    expected_grads = torch.autograd.grad(expected.sum(), exact)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad.double(), expected_grad, atol=10 * bound, rtol=bound)


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


@pytest.mark.parametrize("new", [1, 2, 7])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_tokens_over_the_cache_are_the_last_of_the_whole(window, new):
    q, k, v = qkv(2, 20)
    whole = attend(q, k, v, Documents.whole_rows(2, 20), Visibility(1, window))
    torch.testing.assert_close(attend_cached(q[:, -new:], k, v, Visibility(1, window)), whole[:, -new:])


@pytest.mark.parametrize(
    ("visibility", "copies"),
    [(Visibility(1), 1), (Visibility(1, 16), 1), (Visibility(None), 1), (Visibility(24), 1), (Visibility(150), 2)],
)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_grows_linearly_with_the_row(dtype, heads, visibility, copies):
    def largest(rows):
        documents = both_copies(rows) if copies == 2 else Documents.from_position_ids(positions(*rows))
        q, k, v = qkv(*documents.position_ids.shape, *heads, dtype=dtype)
        with TensorSizes() as sizes:
            attend(q, k, v, documents, visibility).sum().backward()
        return sizes.largest

    for shape in ([512], [200, 56, 256]):
        small, large = largest([shape]), largest([[4 * n for n in shape]])
        assert large <= 4 * small
        assert large < (4 * 512) ** 2 / 8
