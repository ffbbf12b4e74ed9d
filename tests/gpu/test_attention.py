"""The card's kernels compute the formula: values and gradients, whole rows and the parts that ranks share, packed documents."""

import pytest
import torch

from engine.layout.deal import dealt_columns
from model.attention import KeyValueCache, attend, attend_cached, varlen_takes
from model.documents import Documents
from model.part_attention import RowPart, attend_part
from model.segments import seen_keys, segments
from model.visibility import Visibility
from tests.gpu.compare import differences, doubled, peak_bytes
from tests.model.tiny import formula, positions

ROWS = [[1, 299, 700, 24], [1024]]
CAUSAL, BIDIRECTIONAL = Visibility(), Visibility(None)
SEEN = {
    "causal": (CAUSAL, 1),
    "window": (Visibility(1, 100), 1),
    "bidirectional": (BIDIRECTIONAL, 1),
    "chunks": (Visibility(96), 1),
    "two copies in chunks": (Visibility(96), 2),
    "two copies": (BIDIRECTIONAL, 2),
}
HEADS = {"8 heads of 64": (8, 8, 64), "8 heads of 128 on 2": (8, 2, 128)}
BOUNDS = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
"""Of the relative difference: a few roundings of the inputs' dtype."""


def drawn(documents: Documents, heads: str, dtype: torch.dtype) -> list[torch.Tensor]:
    queries, keys, width = HEADS[heads]
    generator = torch.Generator("cuda").manual_seed(0)
    shape = documents.position_ids.shape
    return [
        torch.randn(*shape, n, width, generator=generator, device="cuda", dtype=dtype).requires_grad_()
        for n in (queries, keys, keys)
    ]


def documents_of(rows: list[list[int]], copies: int = 1) -> Documents:
    return Documents.from_position_ids(positions(*(row * copies for row in rows)), torch.device("cuda"), copies)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("seen", SEEN)
def test_values_and_gradients_equal_the_formula(seen, heads, dtype):
    visibility, copies = SEEN[seen]
    documents = documents_of(ROWS, copies)
    problem = drawn(documents, heads, dtype)
    exact = doubled(*problem)
    half = dtype != torch.float32
    assert varlen_takes(problem[0], documents, visibility) == (half and copies == 1 and seen != "chunks")
    found, expected = attend(*problem, documents, visibility), formula(*exact, documents, visibility)
    upstream = torch.randn_like(found)
    grads = torch.autograd.grad(found, problem, upstream)
    expected_grads = torch.autograd.grad(expected, exact, upstream.double())
    assert max(differences([found, *grads], [expected, *expected_grads])) < BOUNDS[dtype]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("seen", ["causal", "bidirectional"])
def test_rows_of_one_document_each_equal_the_formula(seen, heads):
    """cuDNN's kernel, from Hopper on."""
    visibility, _ = SEEN[seen]
    documents = documents_of([[1000], [1000]])
    problem = drawn(documents, heads, torch.bfloat16)
    exact = doubled(*problem)
    found, expected = attend(*problem, documents, visibility), formula(*exact, documents, visibility)
    upstream = torch.randn_like(found)
    grads = torch.autograd.grad(found, problem, upstream)
    expected_grads = torch.autograd.grad(expected, exact, upstream.double())
    assert max(differences([found, *grads], [expected, *expected_grads])) < BOUNDS[torch.bfloat16]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("seen", SEEN)
def test_parts_of_rows_equal_the_formula(seen, dtype):
    """What each of four ranks computes once it has the keys that it needs, put together."""
    visibility, copies = SEEN[seen]
    documents = documents_of(ROWS, copies)
    q, k, v = problem = drawn(documents, "8 heads of 128 on 2", dtype)
    exact = doubled(*problem)
    expected = formula(*exact, documents, visibility)
    out = torch.empty_like(q)
    for columns in dealt_columns(documents, visibility, 4):
        found = segments(documents, columns)
        part = RowPart(found, seen_keys(found, visibility, documents.position_ids.numel()))
        here, at = part.seen.nonzero().flatten().cuda(), columns.cuda()
        some = (x.flatten(0, 1)[here] for x in (k, v))
        own = Documents.from_position_ids(documents.position_ids.cpu(), torch.device("cuda"), copies).part(columns)
        out = out.index_copy(1, at, attend_part(q[:, at], *some, own, visibility, part))
    upstream = torch.randn_like(out)
    grads = torch.autograd.grad(out, problem, upstream)
    expected_grads = torch.autograd.grad(expected, exact, upstream.double())
    assert max(differences([out, *grads], [expected, *expected_grads])) < BOUNDS[dtype]


@pytest.mark.parametrize("visibility", [CAUSAL, Visibility(1, 100)], ids=str)
def test_tokens_over_the_cache_are_the_last_of_the_whole(visibility):
    documents = documents_of([[300]])
    q, k, v = (x.detach() for x in drawn(documents, "8 heads of 128 on 2", torch.bfloat16))
    whole = formula(*(x.double() for x in (q, k, v)), documents, visibility)
    cache = KeyValueCache(300)
    cache.append(k[:, :290], v[:, :290])
    found = attend_cached(q[:, 290:], *cache.append(k[:, 290:], v[:, 290:]), visibility)
    assert differences([found], [whole[:, 290:]])[0] < BOUNDS[torch.bfloat16]


@pytest.mark.parametrize("seen", ["causal", "chunks", "two copies in chunks"])
def test_memory_is_linear_in_the_row_whatever_lengths_came_before(seen):
    """Each length is a compilation of FlexAttention, and past a number of these torch stops compiling."""
    visibility, copies = SEEN[seen]

    def step(tokens: int) -> None:
        documents = documents_of([[tokens]], copies)
        problem = drawn(documents, "8 heads of 64", torch.bfloat16)
        attend(*problem, documents, visibility).float().square().mean().backward()

    for tokens in range(1024, 1024 + 12 * 128, 128):
        step(tokens)
    tokens = 8192
    of_scores = 8 * (copies * tokens) ** 2 * 2
    assert peak_bytes(lambda: step(tokens)) < of_scores / 4
