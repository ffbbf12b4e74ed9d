"""Attention by products of blocks equals its formula as closely as bf16 allows, for all lengths and sizes of its tiles."""

from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from model import causal_products
from model.attention import attend
from model.causal_products import attend_products
from model.documents import Documents
from model.visibility import Visibility
from tests.model.tiny import TensorSizes, formula, positions


def qkv(rows, tokens, heads, shared, width, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(rows, tokens, n, width) for n in (heads, shared, shared)]
    q, k, v = (torch.randn(shape, generator=generator) for shape in shapes)
    return [x.bfloat16().requires_grad_() for x in (scale * q, k, v)]


def passes(attention, tensors):
    """The output and the three gradients."""
    out = attention(*tensors)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    return out.detach(), *torch.autograd.grad(out, tensors, grad.to(out.dtype))


def exact(tensors, documents):
    """The same by the formula in float64."""
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    return passes(partial(formula, documents=documents, visibility=Visibility()), doubles)


def errors(attention, tensors):
    """Relative, of output and gradients."""
    expected = exact(tensors, Documents.whole_rows(*tensors[0].shape[:2]))
    return [
        float((x.double() - y).norm() / y.norm()) for x, y in zip(passes(attention, tensors), expected, strict=True)
    ]


def flash(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def eager(q, k, v):
    """As transformers computes it without a kernel: scores in bf16, their softmax in float32."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(later, -torch.inf)
    return (scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v).transpose(1, 2)


@given(
    rows=st.integers(1, 2),
    tokens=st.integers(1, 70),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 2), (4, 1), (3, 1)]),
    width=st.sampled_from([4, 8, 10]),
    block=st.sampled_from([1, 7, 16, 256]),
    tile=st.sampled_from([1, 300, 3000, 1 << 20]),
)
def test_values_and_gradients_equal_the_formula(rows, tokens, heads, width, block, tile):
    tensors = qkv(rows, tokens, *heads, width)
    with mock.patch.multiple(causal_products, BLOCK_TOKENS=block, TILE_SCORES=tile):
        found = passes(attend_products, tensors)
    for x, y in zip(found, exact(tensors, Documents.whole_rows(rows, tokens)), strict=True):
        torch.testing.assert_close(x.double(), y, atol=0.04, rtol=0.02)


@pytest.mark.parametrize("scale", [1, 4, 16])
@pytest.mark.parametrize(("tokens", "heads", "width"), [(300, (4, 2), 40), (1024, (4, 1), 128), (600, (2, 2), 64)])
def test_errors_are_at_most_twice_those_of_flash_attention(tokens, heads, width, scale):
    """However large the scores are; the errors of a softmax of scores in bf16 grow with them."""
    tensors = qkv(1, tokens, *heads, width, scale)
    found, of_flash, of_eager = (errors(attention, tensors) for attention in (attend_products, flash, eager))
    for ours, theirs, rounded in zip(found, of_flash, of_eager, strict=True):
        assert ours < 2 * theirs
        assert ours < 0.6 * rounded or scale == 1


def test_documents_of_a_row_stay_apart():
    rows = [[100, 1, 63, 156], [320]]
    documents = Documents.from_position_ids(positions(*rows))
    tensors = qkv(2, 320, 4, 2, 16)
    found = passes(lambda q, k, v: attend(q, k, v, documents, products=True), tensors)
    for x, y in zip(found, exact(tensors, documents), strict=True):
        torch.testing.assert_close(x.double(), y, atol=0.04, rtol=0.02)


@pytest.mark.parametrize("visibility", [Visibility(window=100), Visibility(span=8), Visibility(span=None)])
def test_other_masks_and_dtypes_are_left_to_the_other_kernels(visibility):
    documents, tensors = Documents.whole_rows(1, 256), qkv(1, 256, 4, 2, 16)
    with mock.patch.object(causal_products, "_mixed", side_effect=AssertionError):
        attend(*tensors, documents, visibility, products=True)
        attend(*(x.float() for x in tensors), documents, products=True)


def test_memory_is_linear_in_tokens():
    def largest(tokens):
        tensors = qkv(1, tokens, 4, 2, 8)
        with TensorSizes() as sizes, mock.patch.object(causal_products, "TILE_SCORES", 1):
            attend_products(*tensors).sum().backward()
        return sizes.largest

    assert largest(4096) <= 4 * largest(1024)
    assert largest(4096) < 4096**2 / 8


def test_what_is_not_finite_is_not_hidden():
    q, k, v = qkv(1, 80, 2, 2, 8)
    with torch.no_grad():
        q[0, 40, 1, 3] = torch.nan
        out = attend_products(q, k, v)
    lost = out.isnan().any(-1)
    assert lost[0, 40, 1]
    assert lost.sum() == 1
