"""Merged adapters are those that PEFT merges of the same factors, and what the ways promise."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from model.adapter_config import AdaptersConfig
from model.hf.peft import peft_name
from model.llama import Llama
from model.merge_ways import MERGED, WAYS, Choice
from model.merging import combined, merged
from tests.model.hf.test_parity import randomised
from tests.model.tiny import tiny

NAMES = ("plays", "manuals", "topics")
TARGETS = ("q_proj", "v_proj", "up_proj", "down_proj")
SHARES = {"plays": 0.7, "manuals": -0.2, "topics": 0.4}
SEED = 7


def adapted(**options) -> tuple[AdaptersConfig, dict[str, torch.Tensor], Llama]:
    options = {"r": 4, "lora_alpha": {"plays": 8, "manuals": 3, "topics": 4}} | options
    adapters = AdaptersConfig(names=NAMES, target_modules=TARGETS, **options)
    model = randomised(Llama(tiny(adapters=adapters), seed=1))
    return adapters, {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}, model


@pytest.fixture(scope="module")
def theirs():
    """A model of PEFT's with the same factors, and ours."""
    adapters, state, _ = adapted()
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny().to_hf()), dtype=torch.float32)
    for name in NAMES:
        config = LoraConfig(r=4, lora_alpha=adapters.alpha(name), target_modules=list(TARGETS))
        if name == NAMES[0]:
            peft_model = get_peft_model(base, config, adapter_name=name)
        else:
            peft_model.add_adapter(name, config)
    values = dict(peft_model.named_parameters())
    with torch.no_grad():
        for name, tensor in state.items():
            adapter = name.rpartition("_")[2]
            values[peft_name(name, adapter).replace(".weight", f".{adapter}.weight")].copy_(tensor)
    return peft_model, adapters, state


def updates(adapters: AdaptersConfig, state, name: str) -> dict[str, torch.Tensor]:
    """scaling B A of each matrix."""
    modules = [key.removesuffix(f".lora_A_{name}") for key in state if key.endswith(f".lora_A_{name}")]
    scaling = adapters.scaling(name)
    return {m: scaling * state[f"{m}.lora_B_{name}"] @ state[f"{m}.lora_A_{name}"] for m in modules}


@pytest.mark.parametrize("majority_sign", ["total", "frequency"])
@pytest.mark.parametrize("way", WAYS)
def test_a_merged_adapter_is_pefts(theirs, way, majority_sign, monkeypatch):
    """Also where elements are dropped at random: from the same seed on PEFT draws the same mask."""
    peft_model, adapters, state = theirs
    if majority_sign == "frequency" and not WAYS[way].elects:
        return
    # the last that PEFT calls before it draws
    monkeypatch.setattr("peft.tuners.lora.model._freeze_adapter", lambda *_: torch.manual_seed(SEED))
    name = f"{way}-{majority_sign}"
    how = {"density": 0.3, "svd_rank": 5, "majority_sign_method": majority_sign}
    peft_model.add_weighted_adapter(list(SHARES), list(SHARES.values()), name, combination_type=way, **how)
    config, found = combined(adapters, state, way, SHARES, Choice(0.3, 5, majority_sign, SEED))
    assert config.rank(MERGED) == peft_model.peft_config[name].r
    mine = updates(config, found, MERGED)
    assert len(mine) == 2 * len(TARGETS)
    for module, update in mine.items():
        layer = peft_model.get_submodule(f"base_model.model.model.{module}")
        expected = layer.get_delta_weight(name)
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(update, expected, atol=1e-6, rtol=1e-5)


def test_cat_is_the_sum_of_the_updates_whatever_the_ranks():
    adapters, state, model = adapted(r={"plays": 1, "manuals": 3, "topics": 6}, use_rslora=True)
    config, found = combined(adapters, state, "cat", SHARES)
    assert config.rank(MERGED) == 10
    base = [(name, p.detach()) for name, p in model.named_parameters() if "lora_" not in name]
    expected = dict(merged(base, adapters, state, SHARES))
    for name, tensor in merged(base, config, found, {MERGED: 1.0}):
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="ranks differ have no sum of factors, as ties makes it"):
        combined(adapters, state, "ties", SHARES)


def test_svd_of_full_rank_loses_nothing_and_of_less_as_little_as_can_be():
    adapters, state, _ = adapted()
    exact = updates(*combined(adapters, state, "cat", SHARES), MERGED)
    whole = updates(*combined(adapters, state, "svd", SHARES, Choice(rank=200)), MERGED)
    less = updates(*combined(adapters, state, "svd", SHARES, Choice(rank=3)), MERGED)
    for module, update in exact.items():
        torch.testing.assert_close(whole[module], update, atol=1e-6, rtol=1e-5)
        lost = torch.linalg.svdvals(update)[3:].norm()
        torch.testing.assert_close((less[module] - update).norm(), lost, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("way", ["dare_linear_svd", "magnitude_prune_svd", "ties_svd"])
def test_all_elements_kept_of_one_adapter_are_the_adapter(way):
    adapters, state, _ = adapted()
    expected = updates(adapters, state, "plays")
    for module, update in updates(*combined(adapters, state, way, {"plays": 1.0}, Choice(density=1.0)), MERGED).items():
        torch.testing.assert_close(update, expected[module], atol=1e-6, rtol=1e-5)


def test_dare_keeps_the_expectation():
    adapters, state, _ = adapted()
    exact = updates(*combined(adapters, state, "cat", SHARES), MERGED)
    draws = [
        updates(*combined(adapters, state, "dare_linear_svd", SHARES, Choice(0.5, 64, seed=seed)), MERGED)
        for seed in range(100)
    ]
    for module, update in exact.items():
        values = torch.stack([draw[module] for draw in draws])
        error = (values.mean(0) - update) / (values.std(0) / len(draws) ** 0.5 + 1e-6)
        assert error.abs().mean() < 1  # of a standard normal: 0.8


def test_gradients_reach_the_shares_of_each_layer():
    adapters, state, _ = adapted()
    shares = {name: torch.full((2,), 0.5, requires_grad=True) for name in NAMES}
    _, found = combined(adapters, state, "cat", shares)
    sum(tensor.square().sum() for name, tensor in found.items() if "layers.1" in name).backward()
    for share in shares.values():
        assert share.grad[0] == 0
        assert share.grad[1] > 0
