"""Every parameter is in exactly one group, and the right one, on the real model."""

import pytest
import torch
from torch import nn

from model.config import ModelConfig
from model.llama import Llama
from training.muon import Muon
from training.optimizer import Lion, parameter_groups
from training.sections import OptimizerConfig

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LINEAR_MAPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


def split_names(model: nn.Module, groups) -> dict[str, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("extras", [{}, {"attention_bias": True, "mlp_bias": True, "qk_norm": True}])
def test_groups_of_the_model(tied, extras):
    model = Llama(ModelConfig(**SHAPE, tie_word_embeddings=tied, **extras), seed=0)
    groups = parameter_groups(model, OptimizerConfig(weight_decay=0.25))
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(listed) == sorted({id(parameter) for parameter in model.parameters()})
    names = split_names(model, groups)
    expected = {
        name for name, _ in model.named_parameters() if name.endswith(".weight") and name.split(".")[-2] in LINEAR_MAPS
    }
    assert names["decay"] == expected
    assert "embed_tokens.weight" in names["no_decay"]
    assert ("lm_head.weight" in names["decay"]) is not tied
    assert {group["name"]: group["weight_decay"] for group in groups} == {"decay": 0.25, "no_decay": 0.0}


def test_groups_do_not_depend_on_shapes():
    """ZeRO-3 leaves empty one-dimensional tensors in place of parameters that are held elsewhere."""
    model = Llama(ModelConfig(**SHAPE), seed=0)
    whole = split_names(model, parameter_groups(model, OptimizerConfig()))
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    assert split_names(model, parameter_groups(model, OptimizerConfig())) == whole


def test_a_layer_of_the_plan_is_grouped_as_in_the_whole_model():
    """A pipeline stage has the same modules under other names."""
    model = Llama(ModelConfig(**SHAPE), seed=0)
    whole = {id(p): group["name"] for group in parameter_groups(model, OptimizerConfig()) for p in group["params"]}
    layers = [model.embed_tokens, *model.layers, model.norm, model.lm_head]
    stage = nn.Sequential(*layers)
    groups = parameter_groups(stage, OptimizerConfig())
    assert {id(p): group["name"] for group in groups for p in group["params"]} == whole


def test_frozen_parameters_and_empty_groups_are_left_out():
    model = Llama(ModelConfig(**SHAPE), seed=0).requires_grad_(False)
    assert parameter_groups(model, OptimizerConfig()) == []
    model.layers[1].mlp.up_proj.requires_grad_(True)
    (group,) = parameter_groups(model, OptimizerConfig())
    assert group["params"] == [model.layers[1].mlp.up_proj.weight]


def test_torch_takes_the_groups_and_decays_only_the_first():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    optimizer = torch.optim.AdamW(parameter_groups(model, OptimizerConfig(weight_decay=0.5)), lr=0.1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        scale = 1 - 0.1 * 0.5 if name == "2.weight" else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * scale)


@pytest.mark.parametrize(
    "fields",
    [
        {"lr": 0},
        {"lr": float("inf")},
        {"betas": (0.9, 1.0)},
        {"betas": (0.9,)},
        {"weight_decay": -0.1},
        {"max_grad_norm": 0},
        {"name": "adam"},
        {"beta1": 0.9},
    ],
)
def test_impossible_settings_are_refused(fields):
    with pytest.raises(ValueError):
        OptimizerConfig(**fields)


def test_lion_is_algorithm_2_of_its_paper():
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5, 3, generator=generator, dtype=torch.float64))
    expected, average, lr, decay, beta1, beta2 = weight.detach().clone(), torch.zeros(5, 3), 0.01, 0.1, 0.9, 0.99
    optimizer = Lion([{"params": [weight], "weight_decay": decay}], lr=lr, betas=(beta1, beta2))
    for _ in range(4):
        weight.grad = torch.randn(5, 3, generator=generator, dtype=torch.float64)
        update = (beta1 * average + (1 - beta1) * weight.grad).sign()
        expected = expected - lr * (update + decay * expected)
        average = beta2 * average + (1 - beta2) * weight.grad
        optimizer.step()
        torch.testing.assert_close(weight.detach(), expected)


def muon_groups(weights, decay: float) -> list[dict]:
    """And one more parameter, for AdamW."""
    other = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    return [
        {"name": "muon", "params": weights, "weight_decay": decay},
        {"name": "no_decay", "params": [other], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("normalize", [False, True], ids=["muon", "normuon"])
@pytest.mark.parametrize("shape", [(5, 3), (3, 5)])
def test_muon_moves_singular_values_by_the_quintic(shape, normalize):
    """Here by the singular values themselves, with which the iteration does without."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
    lr, decay, momentum, beta2 = 0.01, 0.1, 0.9, 0.8
    optimizer = Muon(muon_groups([weight], decay), lr, (0.9, beta2), 1e-8, momentum, normalize)
    expected, average = weight.detach().clone(), torch.zeros(shape, dtype=torch.float64)
    of_rows = torch.zeros(shape[0], 1, dtype=torch.float64)
    for _ in range(4):
        weight.grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        average = momentum * average + (1 - momentum) * weight.grad
        left, values, right = torch.linalg.svd((1 - momentum) * weight.grad + momentum * average, full_matrices=False)
        values = values / values.norm()
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        update = left @ values.diag() @ right
        size = max(shape) ** 0.5
        if normalize:
            of_rows = beta2 * of_rows + (1 - beta2) * update.square().mean(1, keepdim=True)
            update = update / (of_rows.sqrt() + 1e-8)
            size = (shape[0] * shape[1]) ** 0.5 / update.norm()
        expected = expected * (1 - lr * decay) - lr * 0.2 * size * update
        optimizer.step()
        torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_is_torchs_but_for_its_bfloat16():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.ones(24, 8)) for _ in range(2))
    optimizer = Muon(muon_groups([ours], 0.1), 0.01, (0.9, 0.95), 1e-8, 0.9)
    reference = torch.optim.Muon([theirs], lr=0.01, momentum=0.9, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(5):
        if step == 2:
            del optimizer.state[ours]["step"]  # of which theirs has none: its checkpoints continue
        ours.grad = torch.randn(24, 8, generator=generator)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    moved = (1 - theirs.detach()).norm()
    assert (ours - theirs).norm() < 0.02 * moved


def test_muon_and_adamw_divide_the_model_and_survive_a_checkpoint():
    config = OptimizerConfig(name="muon", weight_decay=0.1)
    ours, theirs = (Llama(ModelConfig(**SHAPE), seed=0) for _ in range(2))
    names = split_names(ours, parameter_groups(ours, config))
    assert {name.split(".")[-2] for name in names["muon"]} == set(LINEAR_MAPS) - {"lm_head"}
    assert names["decay"] == {"lm_head.weight"}
    options = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8}
    optimizer, whole = (Muon(parameter_groups(model, config), momentum=0.9, **options) for model in (ours, theirs))
    adamw = [group for group in parameter_groups(theirs, config) if group["name"] != "muon"]
    for step in range(4):
        if step == 2:
            saved = optimizer.state_dict()
            optimizer = Muon(parameter_groups(ours, config), momentum=0.9, **options)
            optimizer.load_state_dict(saved)
        for model in (ours, theirs):
            model.zero_grad()
            ids = torch.arange(32).view(1, 32) + step
            model(ids, targets=ids + 1)[0].backward()
        if step == 0:
            alone = Llama(ModelConfig(**SHAPE), seed=0)
            alone.load_state_dict(theirs.state_dict())
            others = {name for name, p in theirs.named_parameters() if any(p is q for g in adamw for q in g["params"])}
        optimizer.step()
        whole.step()
        if step == 0:
            groups = [group for group in parameter_groups(alone, config) if group["name"] != "muon"]
            for (name, p), q in zip(alone.named_parameters(), theirs.parameters(), strict=True):
                p.grad = q.grad if name in others else None
            torch.optim.AdamW(groups, fused=True, **options).step()
            for name in others:
                torch.testing.assert_close(alone.get_parameter(name), theirs.get_parameter(name), rtol=0, atol=0)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, msg=name, rtol=0, atol=0)
