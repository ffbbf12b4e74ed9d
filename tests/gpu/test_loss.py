"""The fused cross-entropy on a card: values, gradients, memory."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from model.loss import IGNORED, VocabularyPart, linear_cross_entropy
from tests.gpu.compare import difference, differences, doubled, peak_bytes

TOKENS, WIDTH, VOCABULARY = 3000, 256, 5000
BOUNDS = {torch.bfloat16: 1e-2, torch.float32: 1e-5}


def problem(dtype: torch.dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    options = {"generator": generator, "device": "cuda", "dtype": dtype}
    x = torch.randn(TOKENS, WIDTH, **options).requires_grad_()
    weight = (torch.randn(VOCABULARY, WIDTH, **options) * 0.1).detach().requires_grad_()
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator, device="cuda")
    targets[torch.rand(TOKENS, generator=generator, device="cuda") < 0.2] = IGNORED
    return x, weight, targets


def defined(x, weight, targets, z, weights):
    logits = x @ weight.T
    scale = (targets != IGNORED) * (1.0 if weights is None else weights.double())
    entropy = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
    return ((entropy + z * logits.logsumexp(-1).square()) * scale).sum(), entropy


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("z", [0.0, 1e-2])
def test_values_and_gradients_equal_the_definition(z, weighted, dtype):
    x, weight, targets = problem(dtype)
    weights = torch.rand(TOKENS, device="cuda") * 3 if weighted else None
    exact = doubled(x, weight)
    expected, each = defined(*exact, targets, z, weights)
    objective, losses = linear_cross_entropy(x, weight, targets, z, target_weights=weights)
    assert difference(objective, expected) < BOUNDS[dtype] / 10
    assert difference(losses, each) < BOUNDS[dtype]
    grads = torch.autograd.grad(objective / 7, (x, weight))
    assert max(differences(grads, torch.autograd.grad(expected / 7, exact))) < BOUNDS[dtype]


def test_parts_of_the_vocabulary_agree_on_the_whole():
    x, weight, targets = problem(torch.float32)
    expected = torch.autograd.grad(linear_cross_entropy(x, weight, targets)[0], (x, weight))
    cuts, sent = (0, 2000, VOCABULARY), [[], []]
    parts = [weight[first:last].detach().requires_grad_() for first, last in pairwise(cuts)]
    for number, part in enumerate(parts):
        note = VocabularyPart(cuts[number], lambda numbers, own=sent[number]: own.append(numbers) or numbers[None])
        linear_cross_entropy(x, part, targets, part=note)
    grads = []
    for number, part in enumerate(parts):
        chunks = zip(*sent, strict=True)
        whole = VocabularyPart(cuts[number], lambda _, chunks=chunks: torch.stack(next(chunks)))
        grads.append(torch.autograd.grad(linear_cross_entropy(x, part, targets, part=whole)[0], (x, part)))
    of_x, of_weight = sum(each for each, _ in grads), torch.cat([each for _, each in grads])
    assert max(differences([of_x, of_weight], expected)) < 1e-5


def test_logits_of_all_tokens_never_exist():
    def peak(tokens: int) -> int:
        x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(64_000, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        targets = torch.randint(64_000, (tokens,), device="cuda")
        return peak_bytes(lambda: linear_cross_entropy(x, weight, targets)[0].backward())

    of_more_logits = 32_768 * 64_000 * 2
    assert peak(65_536) - peak(32_768) < of_more_logits / 10
