"""The contrastive loss is its definition, in value and gradient, wherever the pairs are."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.contrast import Contrast, pooled
from tests.properties import examples


def drawn(seed: int, rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the head sees [B, T, 5], float64, and sides [B, T] of pairs that lie behind one another, with gaps."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, tokens, 5, generator=generator, dtype=torch.float64)
    sides = torch.full((rows, tokens), -100)
    for row in sides:
        pairs = int(torch.randint(tokens // 2 + 1, (1,), generator=generator))
        for side, place in enumerate(torch.arange(tokens).chunk(2 * pairs)[: 2 * pairs] if pairs else ()):
            row[place] = side
        odd = int(row.max()) % 2 == 0  # the last query has lost its document
        row[row == row.max()] = -100 if odd and pairs else row.max()
    return x, sides


def definition(x: torch.Tensor, sides: torch.Tensor, temperature: float) -> torch.Tensor:
    vectors = [x[row, sides[row] == side].mean(0) for row in range(len(x)) for side in range(int(sides[row].max()) + 1)]
    unit = [vector / vector.norm() for vector in vectors]
    queries, documents = unit[0::2], unit[1::2]
    losses = [
        (torch.stack([query @ other for other in documents]) / temperature).logsumexp(0)
        - query @ document / temperature
        for query, document in zip(queries, documents, strict=True)
    ]
    return torch.stack(losses) if losses else x.sum((1, 2))[:0]


@examples(60)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(2, 17), st.sampled_from([0.05, 1.0]))
def test_it_is_the_definition(seed, rows, tokens, temperature):
    x, sides = drawn(seed, rows, tokens)
    x.requires_grad_()
    found, expected = Contrast(temperature)(x, sides), definition(x, sides, temperature)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)  # vectors are float32
    mine, theirs = (torch.autograd.grad(loss.sum(), x, allow_unused=True)[0] for loss in (found, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_pairs_of_other_processes_are_negatives():
    """The parts of a batch, each with the documents of all, make up the batch."""
    x, sides = drawn(3, 4, 16)
    documents = pooled(x, sides)[1::2]
    counts = [len(pooled(x[row : row + 1], sides[row : row + 1])) // 2 for row in range(4)]
    assert sum(count > 0 for count in counts) > 1
    parts = [
        Contrast(0.1, lambda own, row=row: (documents, sum(counts[:row])))(x[row : row + 1], sides[row : row + 1])
        for row in range(4)
    ]
    torch.testing.assert_close(torch.cat(parts), Contrast(0.1)(x, sides))


def test_no_pairs_are_no_loss():
    x = torch.randn(2, 6, 5, requires_grad=True)
    loss = Contrast(0.1)(x, torch.full((2, 6), -100)).sum()
    loss.backward()
    assert loss == 0
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_the_right_document_nearest_costs_least(temperature):
    x = torch.eye(4).repeat_interleave(2, 0)[None]
    sides = torch.arange(8)[None]
    best = Contrast(temperature)(x, sides)
    assert (best < Contrast(temperature)(x.roll(2, 1)[:, [0, 3, 2, 5, 4, 7, 6, 1]], sides)).all()
