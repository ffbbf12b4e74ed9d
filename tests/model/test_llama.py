"""The whole model: initial weights, the layer plan, packed rows, checkpointing, memory."""

from itertools import pairwise

import pytest
import torch

from model.documents import Documents
from model.llama import Llama, layer_plan
from tests.model.tiny import SCALINGS, TensorSizes, positions, tiny


def batch(config, rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    position_ids = positions(*rows)
    ids, targets = torch.randint(config.vocab_size, (2, *position_ids.shape), generator=generator).unbind()
    targets = targets.masked_fill(torch.rand(targets.shape, generator=generator) < 0.2, -100)
    return ids, position_ids, targets


VARIANTS = {
    "gqa": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "qk_norm_window": {"qk_norm": True, "sliding_window": 5},
    "bidirectional": {"is_causal": False},
    "chunked": {"is_causal": False, "attention": "chunked", "chunk_size": 6},
} | {f"rope_{name}": {"rope_scaling": scaling} for name, scaling in SCALINGS.items() if scaling}


def flat(output):
    """Objective and sums of a model with targets."""
    objective, sums = output
    return torch.cat([objective[None].double(), sums])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_a_packed_row_equals_its_documents_alone(variant, dtype, tolerance):
    config = tiny(**VARIANTS[variant])
    model = Llama(config, seed=2).to(dtype)
    rows = [[40, 1, 7, 22], [70], [10, 60]]
    ids, position_ids, targets = batch(config, rows)
    packed = model(ids, position_ids)
    sums = flat(model(ids, position_ids, targets, 1e-3))
    packed_grads = torch.autograd.grad(model(ids, position_ids, targets)[0], model.parameters())
    lengths = [n for row in rows for n in row]
    alone, alone_sums, objective = [], 0, 0
    for document, goal in zip(ids.flatten().split(lengths), targets.flatten().split(lengths), strict=True):
        alone.append(model(document.unsqueeze(0)).squeeze(0))
        alone_sums += flat(model(document.unsqueeze(0), targets=goal.unsqueeze(0), z_loss_weight=1e-3))
        objective += model(document.unsqueeze(0), targets=goal.unsqueeze(0))[0]
    torch.testing.assert_close(packed.flatten(0, 1), torch.cat(alone), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(sums, alone_sums, atol=0, rtol=tolerance)
    for packed_grad, grad in zip(packed_grads, torch.autograd.grad(objective, model.parameters()), strict=True):
        assert (packed_grad - grad).norm() <= tolerance * (1 + grad.norm())


@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_chunks_do_not_change_a_causal_model(chunk_size):
    full, chunked = tiny(), tiny(attention="chunked", chunk_size=chunk_size)
    ids, position_ids, targets = batch(full, [[40, 1, 7, 22], [70]])
    outputs = [Llama(config, seed=2)(ids, position_ids, targets) for config in (full, chunked)]
    assert torch.equal(*(flat(output) for output in outputs))


def test_block_diffusion_denoises_each_chunk_given_the_clean_chunks_before_it():
    """Brute force in float64: every chunk by itself, behind the clean tokens of its own document."""
    chunk = 5
    config = tiny(is_causal=False, attention="chunked", chunk_size=chunk)
    model = Llama(config, seed=2).double()
    rows = [[12, 1, 7], [20]]
    clean, position_ids, targets = batch(config, rows)
    noised, _, _ = batch(config, rows, seed=1)
    weights = torch.rand(targets.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    both = torch.cat([noised, clean], 1), torch.cat([position_ids, position_ids], 1)
    ignored = torch.full_like(targets, -100), torch.zeros_like(weights)
    goals, scale = (torch.cat([x, y], 1) for x, y in zip((targets, weights), ignored, strict=True))
    objective, (cross_entropy,) = model(*both, goals, z_loss_weight=0.01, target_weights=scale, copies=2)
    expected = expected_z = 0
    lengths = [n for row in rows for n in row]
    pieces = (x.flatten().split(lengths) for x in (noised, clean, targets, weights))
    for of_noised, of_clean, of_targets, of_weights in zip(*pieces, strict=True):
        for first in range(0, len(of_clean), chunk):
            here = slice(first, first + chunk)
            ids = torch.cat([of_clean[:first], of_noised[here]])
            logits = model(ids.unsqueeze(0))[0, first:]
            log_z = logits.logsumexp(-1)
            counted = of_targets[here] != -100
            nll = log_z - logits.gather(1, of_targets[here].where(counted, 0).unsqueeze(1)).squeeze(1)
            expected = expected + (nll * of_weights[here])[counted].sum()
            expected_z = expected_z + (log_z.square() * of_weights[here])[counted].sum()
    torch.testing.assert_close(cross_entropy, expected.detach())
    torch.testing.assert_close(objective, expected + 0.01 * expected_z)
    found = torch.autograd.grad(objective, model.parameters())
    for grad, other in zip(found, torch.autograd.grad(expected + 0.01 * expected_z, model.parameters()), strict=True):
        torch.testing.assert_close(grad, other, atol=1e-10, rtol=1e-8)


def test_targets_give_the_cross_entropy_of_the_logits():
    config = tiny()
    model = Llama(config).double()
    ids, position_ids, targets = batch(config, [[9, 11], [20]])
    objective, (cross_entropy,) = model(ids, position_ids, targets, z_loss_weight=0.01)
    logits = model(ids, position_ids).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")
    z = logits.logsumexp(-1).square()[targets.flatten() != -100].sum()
    torch.testing.assert_close(cross_entropy, expected.detach())
    torch.testing.assert_close(objective, expected + 0.01 * z)


def test_no_later_token_and_no_other_document_changes_a_logit():
    config = tiny()
    model = Llama(config, seed=1)
    ids, position_ids, _ = batch(config, [[8, 12]])
    changed = ids.clone()
    changed[0, 15] = (changed[0, 15] + 1) % config.vocab_size
    with torch.no_grad():
        difference = (model(ids, position_ids) - model(changed, position_ids)).abs().amax(-1)[0]
    assert not difference[:15].any()
    assert difference[15:].all()


@pytest.mark.parametrize("variant", ["gqa", "tied", "biases"])
def test_a_layer_built_alone_equals_the_layer_in_the_model(variant):
    config = tiny(**VARIANTS[variant])
    model = Llama(config, seed=7)
    torch.manual_seed(123)
    for layer in reversed(layer_plan(config)):
        torch.randn(3)  # the global generator plays no part
        alone = layer.build(7)
        for name, parameter in alone.named_parameters():
            assert torch.equal(parameter, model.get_parameter(f"{layer.name}.{name}")), (layer.name, name)
    assert sorted(model.state_dict()) == sorted(
        f"{layer.name}.{name}"
        for layer in layer_plan(config)
        for name in (["weight"] if layer.tied_to else layer.build(0).state_dict())
    )


def test_weights_are_those_of_float32_rounded_whatever_the_default_dtype():
    reference = Llama(tiny(), seed=4)
    torch.set_default_dtype(torch.bfloat16)
    try:
        rounded = Llama(tiny(), seed=4)
    finally:
        torch.set_default_dtype(torch.float32)
    for (name, parameter), other in zip(reference.named_parameters(), rounded.parameters(), strict=True):
        assert other.dtype == torch.bfloat16
        assert torch.equal(parameter.bfloat16(), other), name


def test_seeds_layers_and_projections_all_differ():
    weights = [m.layers[i].get_parameter(f"{p}.weight").flatten()[:8] for m in (Llama(tiny(), 0), Llama(tiny(), 1))
               for i in (0, 1) for p in ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.up_proj")]  # fmt: skip
    assert len({tuple(w.tolist()) for w in weights}) == len(weights)


def test_initial_standard_deviations_are_depth_scaled():
    config = tiny(hidden_size=256, intermediate_size=512, num_attention_heads=16, num_hidden_layers=8, vocab_size=500)
    for name, parameter in Llama(config).named_parameters():
        if "norm" in name:
            assert (parameter == 1).all()
            continue
        scale = 4 if "o_proj" in name or "down_proj" in name else 1
        assert parameter.std().item() == pytest.approx(config.initializer_range / scale, rel=0.05), name
        assert abs(parameter.mean().item()) < 0.05 * config.initializer_range


@pytest.mark.parametrize("variant", ["gqa", "tied"])
def test_the_plan_runs_as_a_plain_loop(variant):
    config = tiny(**VARIANTS[variant])
    model = Llama(config, seed=3)
    ids, position_ids, _ = batch(config, [[9, 11], [20]])
    layers = {layer.name: layer.build(3) for layer in layer_plan(config)}
    for layer in layer_plan(config):
        if layer.tied_to:
            layers[layer.name].weight = layers[layer.tied_to].weight
    x, documents = ids, Documents.from_position_ids(position_ids)
    for layer in layers.values():
        x = layer(x, documents)
    assert torch.equal(x, model(ids, position_ids))


@pytest.mark.parametrize("variant", ["gqa", "tied", "biases", "qk_norm_window"])
def test_every_parameter_receives_a_gradient_even_without_a_counted_target(variant):
    config = tiny(**VARIANTS[variant])
    model = Llama(config)
    ids, position_ids, targets = batch(config, [[9, 11], [20]])
    objective, cross_entropy = model(ids, position_ids, torch.full_like(targets, -100), z_loss_weight=0.1)
    objective.backward()
    assert objective.item() == cross_entropy.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    model(ids, position_ids, targets)[0].backward()
    assert all(p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_activation_checkpointing_changes_no_bit(variant):
    config = tiny(**VARIANTS[variant])
    ids, position_ids, targets = batch(config, [[9, 31], [40]])
    results = []
    for checkpointing in (False, True, 1):
        model = Llama(config, seed=1)
        model.activation_checkpointing = checkpointing
        objective, _ = model(ids, position_ids, targets)
        results.append((objective, *torch.autograd.grad(objective, model.parameters())))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*results, strict=True))


@pytest.mark.parametrize("chosen", [False, True, 0, 1, 2, 3, 5])
def test_activation_checkpointing_recomputes_so_many_blocks(chosen):
    model = Llama(tiny(num_hidden_layers=5))
    calls = []
    for number, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    model.activation_checkpointing = chosen
    ids, position_ids, targets = batch(model.config, [[20]])
    model(ids, position_ids, targets)[0].backward()
    again = [number for number in range(5) if calls.count(number) == 2]
    assert len(again) == (5 * chosen if isinstance(chosen, bool) else chosen)
    assert len(calls) == 5 + len(again)
    between = [later - earlier for earlier, later in pairwise(again)]
    assert not between or max(between) - min(between) <= 1


def test_inputs_may_be_strided_and_positions_are_not_changed():
    config = tiny()
    model = Llama(config)
    ids, position_ids, targets = batch(config, [[9, 11], [20]])
    position_ids[1] += 5
    before = position_ids.clone()
    strided = [x.t().contiguous().t() for x in (ids, position_ids, targets)]
    assert torch.equal(model(*strided)[0], model(ids, position_ids, targets)[0])
    assert torch.equal(position_ids, before)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("dtype", "tied"), [(torch.float32, False), (torch.bfloat16, True)])
def test_no_tensor_of_a_training_step_is_quadratic_in_the_row(dtype, tied, checkpointing):
    config = tiny(vocab_size=4096, tie_word_embeddings=tied, num_hidden_layers=1)
    model = Llama(config).to(dtype)
    model.activation_checkpointing = checkpointing
    ids, position_ids, targets = batch(config, [[1500, 548], [2048]])
    with TensorSizes() as sizes:
        model(ids, position_ids, targets)[0].backward()
    # the largest is a chunk of logits; all of them would be 4 times, one head's scores 2 times as many elements
    assert sizes.largest == 1024 * config.vocab_size, sizes.shape


def test_bfloat16_stays_close_to_float32():
    config = tiny()
    ids, position_ids, targets = batch(config, [[9, 31], [40]])
    exact = Llama(config, seed=1).bfloat16().float()
    half = Llama(config, seed=1).bfloat16()
    found, expected = half(ids, position_ids, targets), exact(ids, position_ids, targets)
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0)
