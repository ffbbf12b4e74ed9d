"""Logits equal transformers', through the real converter, in both directions, for every option transformers has."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from model.hf.weights import from_hf_model, load_model, save_hf
from model.llama import Llama
from tests.model.tiny import SCALINGS, tiny

OPTIONS = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "wide_heads": {"head_dim": 24},
    "eps_and_theta": {"rms_norm_eps": 1e-3, "rope_theta": 500000.0},
    "sliding_window": {"sliding_window": 7},
    "bidirectional": {"is_causal": False},
    "qk_norm": {"qk_norm": True},
    "qk_norm_bias": {"qk_norm": True, "attention_bias": True},
    "qk_norm_window": {"qk_norm": True, "sliding_window": 7},
    "everything": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
} | {f"rope_{name}": {"rope_scaling": scaling} for name, scaling in SCALINGS.items() if scaling}


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter away from its initial value: zero biases and unit norms would hide mistakes."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


@pytest.mark.parametrize("option", OPTIONS)
def test_logits_equal_transformers_after_export(option, tmp_path):
    config = tiny(**OPTIONS[option])
    ours = randomised(Llama(config, seed=3))
    save_hf(config, ours.state_dict().items(), tmp_path / "out", max_shard_bytes=30_000)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert type(theirs).__name__ == config.to_hf()["architectures"][0]
    # 11: inside the original context of the scaled variants; 29: beyond it; 50: beyond max_position_embeddings
    for tokens in (11, 29, 50):
        ids = torch.randint(config.vocab_size, (2, tokens), generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            expected, logits = theirs(ids).logits, ours(ids)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("option", OPTIONS)
def test_logits_equal_transformers_after_import(option, tmp_path):
    hf_config = AutoConfig.for_model(
        **{k: v for k, v in tiny(**OPTIONS[option]).to_hf().items() if k != "rope_scaling"}
    )
    theirs = randomised(AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32))
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    ours = load_model(tmp_path)
    assert ours.config.model_dump(exclude={"rope_scaling", "head_dim"}) == tiny(**OPTIONS[option]).model_dump(
        exclude={"rope_scaling", "head_dim"}
    )
    config, state = from_hf_model(theirs)
    assert config == ours.config
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    ids = torch.randint(96, (2, 29), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("chunk_size", [1, 6, 40])
def test_chunked_attention_equals_transformers_with_that_mask(implementation, chunk_size):
    config = tiny(is_causal=False, attention="chunked", chunk_size=chunk_size)
    ours = randomised(Llama(config, seed=1))
    as_llama = AutoConfig.for_model(**tiny().to_hf())
    theirs = AutoModelForCausalLM.from_config(as_llama, attn_implementation=implementation, dtype=torch.float32).eval()
    theirs.load_state_dict({("" if n == "lm_head.weight" else "model.") + n: p for n, p in ours.state_dict().items()})
    ids = torch.randint(config.vocab_size, (2, 29), generator=torch.Generator().manual_seed(2))
    chunk = torch.arange(29) // chunk_size
    hidden = torch.zeros(2, 1, 29, 29).masked_fill(chunk > chunk.unsqueeze(1), torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=hidden).logits
        torch.testing.assert_close(ours(ids), expected, atol=1e-5, rtol=1e-5)


def test_gradients_equal_transformers():
    config = tiny(attention_bias=True)
    ours = randomised(Llama(config, seed=1))
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.to_hf()), dtype=torch.float32)
    theirs.load_state_dict({("" if n == "lm_head.weight" else "model.") + n: p for n, p in ours.state_dict().items()})
    ids = torch.randint(config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(2))
    targets = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    objective, sums = ours(ids, targets=targets)
    (objective / 38).backward()
    loss = theirs(ids, labels=ids).loss
    loss.backward()
    assert sums.item() / 38 == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in theirs.named_parameters():
        mine = ours.get_parameter(name.removeprefix("model."))
        torch.testing.assert_close(mine.grad, parameter.grad, atol=1e-5, rtol=1e-4, msg=name)
