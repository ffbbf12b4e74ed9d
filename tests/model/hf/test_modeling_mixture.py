"""The code that travels with mixtures: transformers computes what we do, whole or with a cache, in batches with padding."""

import ast
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from model.adapter_config import AdaptersConfig
from model.config import ModelConfig
from model.generation import generate
from model.hf import modeling_mixture
from model.hf.weights import load_model, save_hf
from model.llama import Llama
from model.loss import IGNORED
from model.mixture import mix
from tests.model.hf.test_parity import randomised
from tests.model.tiny import positions, tiny

NAMES = ("plays", "manuals", "a-b")
ALL = {"names": NAMES, "mode": "mixture", "r": 4}
BY_SOURCE = {"of_plays": {"plays": 4.0, "manuals": 1.0, "a-b": 1.0}, "else": dict.fromkeys(NAMES, 1.0)}
MODELS = {
    "llama": ({"tie_word_embeddings": True}, {"prior": {"plays": 5.0, "manuals": 1.0, "a-b": 0.2}}),
    "bits": ({}, {"evidence": 0.9, "target_modules": ("q_proj", "down_proj"), "last_layers": 1, "use_rslora": True}),
    "tokens": ({"attention_bias": True, "mlp_bias": True}, {"evidence": 0.0, "prior": BY_SOURCE}),
    "qwen": (
        {"qk_norm": True},
        {"r": {"plays": 1, "manuals": 6, "a-b": 3}, "lora_alpha": dict(zip(NAMES, (9, 2, 7), strict=True))},
    ),
    "mistral": ({"sliding_window": 7}, {}),
}


def written(folder, option="llama") -> Llama:
    base, adapters = MODELS[option]
    model = randomised(Llama(tiny(**base, adapters=AdaptersConfig(**ALL | adapters)), seed=1))
    save_hf(model.config, model.state_dict().items(), folder)
    return model


def loaded(folder, **options):
    return AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, **{"dtype": torch.float32} | options
    ).eval()


def some_ids(rows=2, tokens=29):
    return torch.randint(96, (rows, tokens), generator=torch.Generator().manual_seed(tokens))


@torch.no_grad()
def log_probabilities(model: Llama, ids, position_ids=None):
    """[B, T, V] by the definition, from the logits of each member."""
    members = [model(ids, position_ids, adapters=torch.full((len(ids),), i)).double() for i in range(len(NAMES))]
    of_members = torch.stack(members).log_softmax(-1)
    targets = torch.cat([ids[:, 1:], ids[:, :1]], 1)
    begins = torch.zeros_like(ids, dtype=torch.bool) if position_ids is None else position_ids == 0
    begins[:, 0] = True
    of_targets = of_members.gather(-1, targets.expand(len(NAMES), -1, -1)[..., None])[..., 0]
    adapters = model.config.adapters
    prior = torch.tensor(adapters.prior_shares).double().log()
    weights = mix(of_targets, begins, prior, adapters.evidence).log_weights
    return (weights[..., None] + of_members).logsumexp(0)


@pytest.mark.parametrize("option", MODELS)
def test_it_is_the_mixture_there_and_back(option, tmp_path):
    ours, ids = written(tmp_path / "first", option), some_ids()
    expected, close = log_probabilities(ours, ids), {"atol": 2e-5, "rtol": 1e-5, "check_dtype": False}
    theirs = loaded(tmp_path / "first")
    theirs.save_pretrained(tmp_path / "second")
    for folder in ("first", "second"):
        theirs = loaded(tmp_path / folder)
        assert ModelConfig.from_hf(tmp_path / folder) == ModelConfig.from_hf(ours.config.to_hf())
        back = load_model(tmp_path / folder)
        assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())
        with torch.no_grad():
            found = theirs(ids, labels=torch.where(ids % 3 == 0, ids, -100))
        torch.testing.assert_close(found.logits, expected, **close)
        torch.testing.assert_close(found.logits.exp().sum(-1), torch.ones(2, 29))
        targets = torch.where(ids % 3 == 0, ids, -100)[:, 1:]
        loss = F.cross_entropy(expected[:, :-1].flatten(0, 1), targets.flatten())
        torch.testing.assert_close(found.loss, loss, **close)
    packed = positions([10, 19], [3, 26])
    found = theirs(ids, position_ids=packed, use_cache=False).logits
    torch.testing.assert_close(found, log_probabilities(ours, ids, packed), **close)
    if "of_plays" not in ours.config.adapters.prior:
        mean = ours(ids, targets=torch.cat([ids[:, 1:], ids.new_full((2, 1), IGNORED)], 1))[1][0] / 56
        torch.testing.assert_close(theirs(ids, labels=ids).loss, mean, **close)
    torch.testing.assert_close(theirs(ids, logits_to_keep=3).logits, expected[:, -3:], **close)
    half = loaded(tmp_path / "first", dtype=torch.bfloat16)
    assert (half(ids).logits - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("option", ["llama", "bits", "mistral"])
def test_padding_on_either_side_says_nothing(option, tmp_path):
    ours = written(tmp_path, option)
    theirs = loaded(tmp_path)
    short, ids, padding = some_ids(1, 22), some_ids(1, 29), torch.full((1, 7), 3)
    for parts, kept in (((padding, short), slice(7, None)), ((short, padding), slice(0, 22))):
        mask = torch.ones(2, 29, dtype=torch.long)
        mask[1] = 0
        mask[1, kept] = 1
        with torch.no_grad():
            found = theirs(torch.cat([ids, torch.cat(parts, 1)]), attention_mask=mask).logits
        torch.testing.assert_close(found[:1].double(), log_probabilities(ours, ids), atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(found[1:, kept].double(), log_probabilities(ours, short), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("option", MODELS)
def test_generated_texts_are_ours(option, tmp_path):
    ours, prompt = written(tmp_path, option), some_ids(1, 9)
    theirs = loaded(tmp_path)
    greedy = list(generate(ours, prompt, 12, temperature=0))
    how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 3}
    padded = torch.cat([prompt.new_full((1, 4), 3), prompt], 1)
    mask = (torch.arange(13) >= 4).long()[None]
    for use_cache in (True, False):
        assert theirs.generate(prompt, use_cache=use_cache, **how)[0, 9:].tolist() == greedy
        assert theirs.generate(padded, attention_mask=mask, use_cache=use_cache, **how)[0, 13:].tolist() == greedy
    torch.manual_seed(0)
    sampled = theirs.generate(
        prompt.repeat(2, 1),
        max_new_tokens=12,
        do_sample=True,
        top_k=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    with torch.no_grad():
        again = theirs(sampled.sequences).logits[:, 8:-1]
    torch.testing.assert_close(torch.stack(sampled.logits, 1), again, atol=2e-5, rtol=1e-5)
    assert not torch.equal(*sampled.sequences)


def test_beams_keep_their_own_weights(tmp_path):
    written(tmp_path)
    theirs, prompt = loaded(tmp_path), some_ids(2, 9)
    how = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False, "pad_token_id": 3}
    with_cache, without = (theirs.generate(prompt, use_cache=use_cache, **how) for use_cache in (True, False))
    assert torch.equal(with_cache, without)


def test_pieces_of_any_length_continue_a_cache(tmp_path):
    written(tmp_path, "bits")
    theirs, ids = loaded(tmp_path), some_ids()
    with torch.no_grad():
        whole, cache, found = theirs(ids).logits, None, []
        for piece in ids.split([1, 6, 1, 21], 1):
            out = theirs(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, atol=2e-5, rtol=1e-5)


def test_its_loss_has_the_gradients_of_training(tmp_path):
    ours, ids = written(tmp_path, "bits"), some_ids()
    theirs = loaded(tmp_path)
    theirs(ids, labels=ids).loss.backward()
    total, _ = ours(ids, targets=torch.cat([ids[:, 1:], ids.new_full((2, 1), IGNORED)], 1))
    (total / 56).backward()
    mine = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if "lora" in name:
            expected = mine[name.removeprefix("model.")].grad
            torch.testing.assert_close(parameter.grad, expected, atol=1e-6, rtol=1e-4)


def test_it_needs_nothing_of_this_repository():
    tree = ast.parse(Path(modeling_mixture.__file__).read_text())
    roots = {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    roots |= {name.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert roots == {"__future__", "functools", "typing", "torch", "transformers"}


def test_what_it_cannot_is_said(tmp_path):
    written(tmp_path)
    theirs, ids = loaded(tmp_path), some_ids()
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    with pytest.raises(ValueError, match="no inputs_embeds"):
        theirs(inputs_embeds=theirs.model.embed_tokens(ids))
    with pytest.raises(ValueError, match="attention_mask must be of shape"):
        theirs(ids, attention_mask=torch.ones(2, 1, 29, 29))
    with pytest.raises(ValueError, match="only a cache of its own"):
        theirs(ids, past_key_values=StaticCache(theirs.config, max_cache_len=40))
    foreign = DynamicCache()
    foreign.update(torch.zeros(2, 2, 3, 16), torch.zeros(2, 2, 3, 16), 0)
    with pytest.raises(ValueError, match="only a cache of its own"):
        theirs(ids, past_key_values=foreign)
    config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match="model_type 'mixture_llama' is not supported"):
        ModelConfig.from_hf({key: value for key, value in config.items() if key != "adapters"})
