"""Chunked cross-entropy equals the full one, in value and gradient, without its memory."""

from functools import cache, partial
from unittest import mock

import pytest
import torch
import torch._dynamo.utils
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from model import loss
from model.loss import IGNORED, VocabularyPart, linear_cross_entropy, reported_sums
from tests.model.tiny import TensorSizes


def full(x, weight, targets, z_loss_weight, target_weights=None):
    """The definition, with all logits at once."""
    logits = x.flatten(0, -2) @ weight.T
    targets = targets.flatten()
    scale = (targets != IGNORED) * (1.0 if target_weights is None else target_weights.flatten())
    cross_entropy = (F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none") * scale).sum()
    z = (logits.logsumexp(-1).square() * scale).sum()
    return cross_entropy + z_loss_weight * z, cross_entropy


def summed(found, target_weights=None):
    """What `linear_cross_entropy` returns, as `full` does."""
    objective, losses = found
    return objective, (losses if target_weights is None else losses * target_weights).sum()


def problem(tokens, width, vocabulary, ignored, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < ignored] = IGNORED
    return x, weight, targets


@given(
    tokens=st.integers(1, 40),
    width=st.integers(1, 9),
    vocabulary=st.integers(1, 20),
    chunk=st.integers(1, 45),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    z=st.sampled_from([0.0, 1e-4, 0.5]),
    upstream=st.sampled_from([1.0, 0.25, -3.0]),
    weighted=st.booleans(),
    slab=st.sampled_from([1, 30, 1000]),
    seed=st.integers(0, 5),
)
def test_value_and_gradients_equal_the_full_computation(
    tokens, width, vocabulary, chunk, ignored, z, upstream, weighted, slab, seed
):
    x, weight, targets = problem(tokens, width, vocabulary, ignored, seed)
    target_weights = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) * 9 if weighted else None
    expected = full(x, weight, targets, z, target_weights)
    expected_grads = torch.autograd.grad(expected[0] * upstream, (x, weight))
    with mock.patch.object(loss, "SLAB_ELEMENTS", slab):
        found = linear_cross_entropy(x, weight, targets, z, chunk, target_weights=target_weights)
        grads = torch.autograd.grad(found[0] * upstream, (x, weight))
    torch.testing.assert_close(summed(found, target_weights), tuple(expected), atol=1e-10, rtol=1e-10)
    assert not found[1].requires_grad
    torch.testing.assert_close(grads, expected_grads, atol=1e-10, rtol=1e-10)


@given(
    tokens=st.integers(1, 30),
    vocabulary=st.integers(3, 20),
    processes=st.integers(1, 3),
    chunk=st.integers(1, 35),
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    z=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 5),
)
def test_processes_with_a_part_of_the_vocabulary_agree_on_the_whole(
    tokens, vocabulary, processes, chunk, ignored, z, seed
):
    x, weight, targets = problem(tokens, 4, vocabulary, ignored, seed)
    expected = full(x, weight, targets, z)
    expected_x, expected_weight = torch.autograd.grad(expected[0], (x, weight))
    ids = torch.arange(vocabulary).tensor_split(processes)
    weights = [part.detach().requires_grad_() for part in weight.tensor_split(processes)]
    sent = [[] for _ in ids]  # by process, what it tells the others in each chunk

    def note(process):
        return lambda numbers: sent[process].append(numbers) or numbers.unsqueeze(0)

    for process, part in enumerate(weights):
        vocabulary_part = VocabularyPart(int(ids[process][0]), note(process))
        linear_cross_entropy(x, part, targets, z, chunk, vocabulary_part)
    grads = []
    for process, part in enumerate(weights):
        chunks = zip(*sent, strict=True)
        vocabulary_part = VocabularyPart(int(ids[process][0]), lambda _, chunks=chunks: torch.stack(next(chunks)))
        found = linear_cross_entropy(x, part, targets, z, chunk, vocabulary_part)
        torch.testing.assert_close(summed(found), tuple(expected), atol=1e-10, rtol=1e-10)
        grads.append(torch.autograd.grad(found[0], (x, part)))
    torch.testing.assert_close(sum(grad for grad, _ in grads), expected_x, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(torch.cat([grad for _, grad in grads]), expected_weight, atol=1e-10, rtol=1e-10)


@given(
    ignored=st.sampled_from([0.0, 0.3, 1.0]),
    z=st.sampled_from([0.0, 0.5]),
    weighted=st.booleans(),
    seed=st.integers(0, 5),
)
def test_the_form_that_is_compiled_for_accelerators_is_the_same(ignored, z, weighted, seed):
    x, weight, targets = problem(30, 9, 20, ignored, seed)
    weights = torch.rand(30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) if weighted else None
    results = []
    for softmax in (loss._softmax, loss._fused_softmax):
        logits = (x @ weight.T).detach()
        results.append((*softmax(logits, targets, weights, torch.float64, z, None, True), logits))
    torch.testing.assert_close(*results, atol=1e-12, rtol=1e-12)


def test_it_is_not_compiled_anew_for_every_number_of_rows(monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(loss, "compiled", cache(partial(torch.compile, backend="aot_eager")))
    for tokens in (30, 17, 2, 64, 9, 33):
        x, weight, targets = problem(tokens, 9, 20, 0.3)
        logits = (x @ weight.T).detach()
        found, other = logits.clone(), logits.clone()
        loss._compiled_softmax(found, targets, None, torch.float64, 0.1, None, True)
        loss._softmax(other, targets, None, torch.float64, 0.1, None, True)
        torch.testing.assert_close(found, other, atol=1e-12, rtol=1e-12)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_only_the_gradients_asked_for_are_made(frozen):
    x, weight, targets = problem(9, 4, 7, 0.2)
    tensors = {"x": x, "weight": weight}
    tensors[frozen].requires_grad_(False)
    wanted = next(t for name, t in tensors.items() if name != frozen)
    (expected,) = torch.autograd.grad(full(x, weight, targets, 0.1)[0], wanted)
    (found,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets, 0.1, 4)[0], wanted)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_no_counted_target_is_a_zero_with_zero_gradients():
    x, weight, targets = problem(12, 4, 7, 1.0)
    objective, losses = linear_cross_entropy(x, weight, targets, 0.1, 5)
    assert objective.item() == losses.abs().sum().item() == 0.0
    objective.backward()
    assert not x.grad.any()
    assert not weight.grad.any()


def test_rows_may_be_strided_and_batched():
    x, weight, targets = problem(24, 4, 7, 0.3)
    strided = x.view(4, 6, 4).transpose(0, 1)
    strided_targets = targets.view(4, 6).transpose(0, 1)
    assert not strided.is_contiguous()
    found = linear_cross_entropy(strided, weight, strided_targets, 0.0, 5)
    torch.testing.assert_close(summed(found), full(x, weight, targets, 0.0))
    torch.testing.assert_close(
        torch.autograd.grad(found[0], x), torch.autograd.grad(full(x, weight, targets, 0.0)[0], x)
    )


def test_bfloat16_stays_close_to_float64_and_sums_the_weight_gradient_in_float32():
    x, weight, targets = problem(512, 32, 100, 0.1, dtype=torch.bfloat16)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    expected = full(*exact, targets, 1e-4)
    expected_grads = torch.autograd.grad(expected[0], exact)
    torch_grads = torch.autograd.grad(full(x, weight, targets, 1e-4)[0], (x, weight))
    # 64 chunks: summed in bfloat16 the gradient of the weight would be 1.7 times as wrong
    found = linear_cross_entropy(x, weight, targets, 1e-4, 8)
    grads = torch.autograd.grad(found[0], (x, weight))
    assert found[0].dtype == torch.float32
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.bfloat16]
    torch.testing.assert_close(found[0].double(), expected[0], atol=0, rtol=1e-3)
    for grad, of_torch, exact in zip(grads, torch_grads, expected_grads, strict=True):
        assert (grad.double() - exact).norm() < 1.05 * (of_torch.double() - exact).norm()


def test_the_scale_of_the_loss_is_not_rounded_to_bfloat16():
    x, weight, targets = problem(64, 16, 50, 0.0, dtype=torch.bfloat16)
    scale = 1 / 95  # bfloat16 would round it down by 0.27 %
    objective, _ = linear_cross_entropy(x, weight, targets)
    whole = torch.autograd.grad(objective, (x, weight), retain_graph=True)
    for small, large in zip(torch.autograd.grad(objective * scale, (x, weight)), whole, strict=True):
        assert (small.double().norm() / large.double().norm()).item() == pytest.approx(scale, rel=3e-4)


def test_backward_may_run_twice():
    x, weight, targets = problem(9, 4, 7, 0.2)
    objective, _ = linear_cross_entropy(x, weight, targets, 0.1, 4)
    first = torch.autograd.grad(objective, (x, weight), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(objective * 2, (x, weight)), tuple(g * 2 for g in first))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_logits_of_all_tokens_never_exist(dtype):
    tokens, width, vocabulary, chunk = 256, 8, 400, 32
    x, weight, targets = problem(tokens, width, vocabulary, 0.1, dtype=dtype)
    with TensorSizes() as sizes:
        linear_cross_entropy(x, weight, targets, 1e-4, chunk)[0].backward()
    assert sizes.largest == chunk * vocabulary
    with TensorSizes() as sizes:
        full(x, weight, targets, 1e-4)[0].backward()
    assert sizes.largest == tokens * vocabulary, "the observer must see what is avoided"


def test_without_gradients_no_gradient_work_is_done():
    x, weight, targets = problem(64, 8, 50, 0.1)
    with torch.no_grad(), TensorSizes() as sizes:
        found = linear_cross_entropy(x, weight, targets, 0.0, 16)
    assert sizes.largest == 16 * 50
    assert not found[0].requires_grad
    torch.testing.assert_close(summed(found), full(x, weight, targets, 0.0))


@pytest.mark.parametrize("weighted", [False, True])
def test_losses_of_single_tokens(weighted):
    x, weight, targets = problem(60, 5, 13, 0.3)
    weights = torch.rand(4, 15) if weighted else None
    target = targets.view(4, 15)
    _, found = linear_cross_entropy(x.view(4, 15, 5), weight, target, chunk_tokens=7, target_weights=weights)
    expected = F.cross_entropy(x @ weight.T, targets, ignore_index=IGNORED, reduction="none")
    torch.testing.assert_close(found, expected.view(4, 15))
    assert (found[target == IGNORED] == 0).all()
    assert not found.requires_grad
    _, half = linear_cross_entropy(x.bfloat16(), weight.bfloat16(), targets)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), expected, rtol=0.03, atol=0.03)


def test_sums_are_told_apart_by_the_adapter_of_a_row():
    losses = torch.arange(12.0).view(4, 3)
    torch.testing.assert_close(
        reported_sums(losses, None, torch.tensor([2, 0, 2, 2]), 3), torch.tensor([66.0, 12, 0, 54]).double()
    )
    torch.testing.assert_close(reported_sums(losses, losses, None, 2), torch.tensor([506.0, 0, 0]).double())
