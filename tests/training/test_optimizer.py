"""Every parameter is in exactly one group, and the right one, on the real model."""

import pytest
import torch
from torch import nn

from model.config import ModelConfig
from model.llama import Llama
from training.optimizer import Lion, MuonAndAdamW, parameter_groups
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


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_and_adamw_are_torchs_two_side_by_side():
    """On one model, and after its state went through a checkpoint."""
    config = OptimizerConfig(name="muon", weight_decay=0.1)
    ours, theirs = (Llama(ModelConfig(**SHAPE), seed=0) for _ in range(2))
    names = split_names(ours, parameter_groups(ours, config))
    assert {name.split(".")[-2] for name in names["muon"]} == set(LINEAR_MAPS) - {"lm_head"}
    assert names["decay"] == {"lm_head.weight"}
    options = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8}
    optimizer = MuonAndAdamW(parameter_groups(ours, config), momentum=0.9, **options)
    groups = {group["name"]: group for group in parameter_groups(theirs, config)}
    muon = torch.optim.Muon([groups.pop("muon")], lr=0.01, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(list(groups.values()), fused=True, **options)
    for step in range(4):
        if step == 2:
            saved = optimizer.state_dict()
            optimizer = MuonAndAdamW(parameter_groups(ours, config), momentum=0.9, **options)
            optimizer.load_state_dict(saved)
        for model in (ours, theirs):
            ids = torch.arange(32).view(1, 32) + step
            model(ids, targets=ids + 1)[0].backward()
        for optimizer_of_all in (optimizer, muon, adamw):
            optimizer_of_all.step()
        for model in (ours, theirs):
            model.zero_grad()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, msg=name)
