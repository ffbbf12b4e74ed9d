"""The mixture of likelihoods is the one that the definition computes token by token, in value and gradient."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.loss import IGNORED, linear_cross_entropy
from model.mixture import mix, mixture_cross_entropy
from tests.properties import examples


def definition(likelihoods, begins, prior, share):
    """Of probabilities [N, B, T] in plain loops: those of the mixture [B][T], and its weights [B][T][N]."""
    (members, rows, tokens), prior = likelihoods.shape, prior.tolist()
    mixed, weights = [], []
    for row in range(rows):
        mixed.append([])
        weights.append([])
        for token in range(tokens):
            if token == 0 or begins[row, token]:
                weight = prior
            weights[-1].append(weight)
            each = [weight[i] * likelihoods[i, row, token].item() for i in range(members)]
            mixed[-1].append(sum(each))
            following = [each[i] ** share * prior[i] ** (1 - share) for i in range(members)]
            weight = [value / sum(following) for value in following]
    return mixed, weights


shapes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 17))
shares = st.sampled_from([0.0, 0.3, 0.9, 1.0])


def drawn(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    likelihoods = torch.rand(shape, generator=generator, dtype=torch.float64).clamp(min=1e-6)
    begins = torch.rand(shape[1:], generator=generator) < 0.3
    prior = torch.rand(shape[0], generator=generator, dtype=torch.float64) + 0.05
    return likelihoods, begins, prior / prior.sum()


@examples(200)
@given(shapes, shares, st.integers(0, 10**6))
def test_it_is_the_definition(shape, share, seed):
    likelihoods, begins, prior = drawn(shape, seed)
    mixed, weights = definition(likelihoods, begins, prior, share)
    found = mix(likelihoods.log(), begins, prior.log(), share)
    torch.testing.assert_close(found.log_likelihoods.exp(), torch.tensor(mixed, dtype=torch.float64))
    expected = torch.tensor(weights, dtype=torch.float64).permute(2, 0, 1)
    torch.testing.assert_close(found.log_weights.exp(), expected)
    torch.testing.assert_close(found.log_responsibilities.exp().sum(0), torch.ones(shape[1:], dtype=torch.float64))


@examples(100)
@given(shapes, shares, st.integers(0, 10**6), st.integers(0, 16))
def test_weights_come_from_the_prefix(shape, share, seed, token):
    likelihoods, begins, prior = drawn(shape, seed)
    token %= shape[2]
    other = likelihoods.clone()
    other[..., token:] = 0.5
    first, second = (mix(each.log(), begins, prior.log(), share).log_weights for each in (likelihoods, other))
    torch.testing.assert_close(first[..., : token + 1], second[..., : token + 1])


@pytest.mark.parametrize("tokens", [1, 7, 4096])
def test_whole_documents_are_mixed_at_share_1(tokens):
    """And none costs more than under any member and its place in the prior, to float64's rounding over long documents."""
    likelihoods, _, prior = drawn((3, 8, tokens), seed=tokens)
    begins = torch.zeros(8, tokens, dtype=torch.bool)
    logs = likelihoods.log()
    documents = mix(logs, begins, prior.log(), 1.0).log_likelihoods.sum(1)
    members = logs.sum(2) + prior.log()[:, None]
    torch.testing.assert_close(documents, members.logsumexp(0), rtol=1e-12, atol=1e-12)
    assert (documents >= members.max(0).values - 1e-9).all()


@examples(60)
@given(shapes, shares, st.integers(0, 10**6), st.sampled_from([0.0, 0.4, 1.0]))
def test_gradients_are_those_of_the_whole_softmax(shape, share, seed, ignored):
    (members, rows, tokens), generator = shape, torch.Generator().manual_seed(seed)
    float64 = {"generator": generator, "dtype": torch.float64}
    hidden = [torch.randn(rows, tokens, 5, **float64).requires_grad_() for _ in range(members)]
    weight = torch.randn(11, 5, **float64).requires_grad_()
    logits = torch.randn(members, **float64).requires_grad_()
    targets = torch.randint(11, (rows, tokens), generator=generator)
    targets[torch.rand(rows, tokens, generator=generator) < ignored] = IGNORED
    begins = torch.rand(rows, tokens, generator=generator) < 0.3
    variables = [*hidden, weight, logits]

    counted = targets != IGNORED
    index = targets.where(counted, 0)
    of_members = [(x @ weight.T).log_softmax(-1).gather(-1, index[..., None]).squeeze(-1) * counted for x in hidden]
    whole = -(mix(torch.stack(of_members), begins, logits.log_softmax(0), share).log_likelihoods * counted).sum()
    expected = torch.autograd.grad(whole, variables)

    cross_entropy, stacked = partial(linear_cross_entropy, weight=weight), torch.cat(hidden)
    arguments = cross_entropy, stacked, targets, begins
    found, mixed = mixture_cross_entropy(*arguments, logits.log_softmax(0), share)
    torch.testing.assert_close(found, whole)
    for mine, theirs in zip(torch.autograd.grad(found, variables), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    with torch.no_grad():
        again, _ = mixture_cross_entropy(*arguments, logits.log_softmax(0), share)
    torch.testing.assert_close(again, whole)
    assert not mixed.log_weights.requires_grad


def test_one_member_is_itself():
    likelihoods = torch.full((1, 2, 5), math.log(0.3), dtype=torch.float64)
    for share in (0.0, 0.5, 1.0):
        mixed = mix(likelihoods, torch.zeros(2, 5, dtype=torch.bool), torch.zeros(1, dtype=torch.float64), share)
        torch.testing.assert_close(mixed.log_likelihoods, likelihoods[0])
