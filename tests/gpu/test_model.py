"""The whole model on a card: in float32 as in float64 on a CPU, and in bfloat16 no further off than `transformers`."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine.build import compile_blocks
from model.adapter_config import AdaptersConfig
from model.config import ModelConfig
from model.generation import generate
from model.hf.weights import to_hf_state
from model.llama import Llama
from tests.gpu.compare import difference, differences
from tests.model.test_llama import VARIANTS, batch
from tests.model.tiny import tiny

ROWS = [[40, 1, 7, 22], [70], [10, 60]]


def gradients(model: Llama, *arguments, **more) -> tuple[torch.Tensor, list[torch.Tensor]]:
    objective, _ = model(*arguments, **more)
    return objective.detach(), list(torch.autograd.grad(objective, list(model.parameters())))


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_equals_float64_on_the_cpu(variant):
    config = tiny(**VARIANTS[variant])
    ids, places, targets = batch(config, ROWS)
    expected = gradients(Llama(config, seed=2).double(), ids, places, targets, 1e-3)
    found = gradients(Llama(config, seed=2).cuda(), ids.cuda(), places, targets.cuda(), 1e-3)
    assert difference(found[0], expected[0]) < 1e-6
    assert max(differences(found[1], expected[1])) < 1e-4


@pytest.mark.parametrize("compiled", [False, True])
def test_bfloat16_is_no_further_off_than_transformers(compiled):
    config = ModelConfig(
        vocab_size=2000,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    exact = Llama(config, seed=1).double().cuda()
    ids = torch.randint(config.vocab_size, (2, 1024), device="cuda")
    expected, _ = exact(ids), exact.requires_grad_(False)
    ours = Llama(config, seed=1).cuda().bfloat16().requires_grad_(False)
    if compiled:
        compile_blocks(ours)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.to_hf()), dtype=torch.bfloat16).cuda()
    theirs.load_state_dict(to_hf_state(ours.state_dict(), config), strict=False)
    error = difference(ours(ids), expected)
    assert error < 1.2 * difference(theirs(ids).logits, expected)
    assert error < 3e-2


def test_recomputed_and_compiled_blocks_are_no_further_off():
    config = tiny(hidden_size=256, num_attention_heads=4, head_dim=64, initializer_range=0.05)
    ids, places, targets = batch(config, [[400, 112], [512]])
    problem = ids.cuda(), places, targets.cuda()
    exact = gradients(Llama(config, seed=3).cuda().double(), *problem)
    plain, compiled = (Llama(config, seed=3).cuda().bfloat16() for _ in range(2))
    expected = gradients(plain, *problem)
    compile_blocks(compiled)
    bound = 1.2 * max(differences(expected[1], exact[1]))
    for model, recomputes in ((plain, True), (compiled, False), (compiled, True)):
        model.activation_checkpointing = recomputes
        loss, found = gradients(model, *problem)
        assert torch.equal(loss, expected[0]) or (model is compiled and difference(loss, exact[0]) < 1e-3)
        assert max(differences(found, exact[1])) < bound


@pytest.mark.parametrize("mode", ["routed", "mixture", "hard"])
def test_adapters_equal_those_on_the_cpu(mode):
    adapters = {"names": ("a", "b"), "mode": mode, "r": 4, "lora_dropout": 0.25 * (mode == "routed")}
    config = tiny(adapters=AdaptersConfig(**adapters))
    ids, places, targets = batch(config, ROWS)
    more = {"seeds": torch.tensor([5, 6, 7])}
    if mode != "mixture":
        more["adapters"] = torch.tensor([0, 1, 0])
    results = []
    for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32)):
        model = Llama(config, seed=2).to(device, dtype)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if "lora_B" in name:
                    generator = torch.Generator().manual_seed(len(name))
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        objective, _ = model(ids.to(device), places, targets.to(device), **more)
        trained = [p for p in model.parameters() if p.requires_grad]
        results.append([objective, *torch.autograd.grad(objective, trained)])
    assert max(differences(results[1], results[0])) < 1e-4


def test_generated_text_is_that_of_the_cpu():
    config = tiny(initializer_range=0.5)
    prompt = torch.randint(config.vocab_size, (12,), generator=torch.Generator().manual_seed(0)).tolist()
    texts = [
        list(generate(Llama(config, seed=2).to(device), torch.tensor(prompt, device=device), 16, temperature=0.0))
        for device in ("cpu", "cuda")
    ]
    assert texts[0] == texts[1]
