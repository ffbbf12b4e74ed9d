"""PEFT loads our adapters and we load PEFT's, with equal logits; merged ones compute the same without adapters."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from model.adapter_config import PROJECTIONS, AdaptersConfig, adapter_of
from model.config import ModelConfig
from model.hf.peft import CONFIG, WEIGHTS, PeftAdapter, save_peft
from model.hf.weights import load_model, save_hf
from model.llama import Llama
from model.merging import merged
from tests.model.test_adapters import SHAPE, ids

ADAPTERS = {"names": ("one", "two"), "r": {"one": 4, "two": 3}, "lora_alpha": {"one": 8, "two": 5}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model with two adapters that are not zero, its base as a Hugging Face folder and both as PEFT's."""
    folder = tmp_path_factory.mktemp("peft")
    config = ModelConfig(**SHAPE, adapters=AdaptersConfig(**ADAPTERS, last_layers=2))
    model, generator = Llama(config, seed=5), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    base = {name: tensor for name, tensor in model.state_dict().items() if adapter_of(name) is None}
    plain = config.model_copy(update={"adapters": AdaptersConfig()})
    save_hf(plain, base.items(), folder / "base")
    for name in config.adapters.names:
        save_peft(config, name, model.state_dict(), folder / name, str(folder / "base"), "a digest")
    return folder, model, plain, base


def logits(model: Llama, adapter: int) -> torch.Tensor:
    return model(ids(2), adapters=torch.full((2,), adapter))


def test_peft_loads_each_adapter(trained):
    folder, model, *_ = trained
    for number, name in enumerate(model.config.adapters.names):
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        theirs = PeftModel.from_pretrained(base, folder / name)
        torch.testing.assert_close(theirs(ids(2)).logits, logits(model, number), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("targets", [PROJECTIONS, ("q_proj", "down_proj")])
def test_an_adapter_of_pefts_loads_as_ours(trained, tmp_path, targets):
    folder, _, plain, base = trained
    lora = LoraConfig(r=5, lora_alpha=7, target_modules=list(targets), layers_to_transform=[1, 2])
    lora.init_lora_weights = False
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32), lora)
    theirs.save_pretrained(tmp_path)
    found = PeftAdapter(tmp_path, plain)
    assert (found.r, found.lora_alpha, found.target_modules) == (5, 7, targets)
    config = {"r": 5, "lora_alpha": 7, "target_modules": targets, "last_layers": len(found.layers)}
    ours = Llama(plain.model_copy(update={"adapters": AdaptersConfig(names=("x",), **config)}))
    ours.load_state_dict(base | found.state("x"))
    torch.testing.assert_close(logits(ours, 0), theirs(ids(2)).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shares", [{"one": 1.0}, {"one": 0.3, "two": 0.7}])
def test_merged_adapters_compute_the_sum_of_their_updates(trained, tmp_path, shares):
    folder, model, plain, base = trained
    state, adapters = model.state_dict(), model.config.adapters
    weights = dict(merged(base.items(), adapters, state, shares))
    if len(shares) == 1:
        save_hf(plain, weights.items(), tmp_path / "merged")
        torch.testing.assert_close(load_model(tmp_path / "merged")(ids(2)), logits(model, 0), atol=1e-5, rtol=1e-5)
        return
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32), folder / "one", adapter_name="one"
    )
    theirs.load_adapter(folder / "two", adapter_name="two")
    ours = Llama(plain)
    ours.load_state_dict(weights)
    theirs.add_weighted_adapter(["one", "two"], [0.3, 0.7], "both", combination_type="cat")
    theirs.set_adapter("both")
    torch.testing.assert_close(ours(ids(2)), theirs(ids(2)).logits, atol=1e-5, rtol=1e-5)


def test_the_digest_of_the_base_travels(trained):
    folder, _, plain, _ = trained
    assert PeftAdapter(folder / "one", plain).base_digest == "a digest"


BAD = {
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, "is no LoRA"),
    "DoRA": ({"use_dora": True}, "use_dora True is more than plain LoRA"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "its own code": ({"auto_mapping": {"parent_library": "evil"}}, "code of evil"),
    "rank patterns": ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    "no number": ({"r": "four"}, "r must be a number above 0"),
}


@pytest.mark.parametrize("kind", BAD)
def test_other_kinds_are_refused_in_a_sentence(trained, tmp_path, kind):
    folder, _, plain, _ = trained
    change, sentence = BAD[kind]
    (tmp_path / WEIGHTS).write_bytes((folder / "one" / WEIGHTS).read_bytes())
    (tmp_path / CONFIG).write_text(json.dumps(json.loads((folder / "one" / CONFIG).read_text()) | change))
    with pytest.raises(ValueError, match=sentence):
        PeftAdapter(tmp_path, plain)


def test_another_base_a_pickle_and_damage_are_refused(trained, tmp_path):
    folder, _, plain, _ = trained
    wider = plain.model_copy(update={"intermediate_size": 96})
    with pytest.raises(ValueError, match="an adapter of another model"):
        PeftAdapter(folder / "one", wider)
    with pytest.raises(ValueError, match=r"\[1, 2\] are not the last ones of the base's 5"):
        PeftAdapter(folder / "one", plain.model_copy(update={"num_hidden_layers": 5}))
    (tmp_path / CONFIG).write_bytes((folder / "one" / CONFIG).read_bytes())
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(ValueError, match="is a pickle, which could run code"):
        PeftAdapter(tmp_path, plain)
    (tmp_path / WEIGHTS).write_bytes((folder / "one" / WEIGHTS).read_bytes()[:-20])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        PeftAdapter(tmp_path, plain)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        PeftAdapter(tmp_path, plain)
    with pytest.raises(ValueError, match="no folder of PEFT's"):
        PeftAdapter(folder / "base", plain)


def test_a_full_disk_is_an_error_of_the_file_system(trained):
    """As for other weights; the commands make a sentence of it."""
    _, model, *_ = trained
    with pytest.raises(OSError, match="cannot be written"):
        save_peft(model.config, "one", model.state_dict(), Path("/proc/self"), None)
