"""Config arithmetic, validation, and the two Hugging Face forms."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from model.config import ModelConfig
from model.hf.config import left_out
from model.llama import Llama
from tests.model.tiny import SCALINGS, tiny

LLAMA_1B = {
    # the published config of Llama 3.2 1B, as transformers 4 wrote it
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}


@st.composite
def configs(draw) -> ModelConfig:
    kv_heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    qk_norm, mlp_bias, attention_bias = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    return tiny(
        num_key_value_heads=kv_heads,
        num_attention_heads=kv_heads * groups,
        hidden_size=kv_heads * groups * 16,
        head_dim=draw(st.sampled_from([None, 16])),
        num_hidden_layers=draw(st.integers(1, 3)),
        vocab_size=draw(st.integers(2, 50)),
        rope_theta=draw(st.sampled_from([10000.0, 1e6])),
        rope_scaling=draw(st.sampled_from(list(SCALINGS.values()))),
        tie_word_embeddings=draw(st.booleans()),
        qk_norm=qk_norm,
        attention_bias=attention_bias,
        mlp_bias=mlp_bias and not qk_norm,
        sliding_window=draw(st.sampled_from([None, 8])) if qk_norm or not (mlp_bias or attention_bias) else None,
    )


@given(configs())
def test_num_parameters_counts_the_model(config):
    with torch.device("meta"):
        assert config.num_parameters() == sum(p.numel() for p in Llama(config).parameters())


@given(configs())
def test_to_hf_and_back_is_the_same_model(config):
    hf = json.loads(json.dumps(config.to_hf({"bos_token_id": 1, "eos_token_id": 2})))
    assert (hf["bos_token_id"], hf["eos_token_id"], hf["pad_token_id"]) == (1, 2, None)
    back = ModelConfig.from_hf(hf)
    assert back.to_hf() == config.to_hf()
    old_form = {key: value for key, value in hf.items() if key != "rope_parameters"}
    new_form = {key: value for key, value in hf.items() if key not in ("rope_theta", "rope_scaling")}
    assert back == ModelConfig.from_hf(old_form) == ModelConfig.from_hf(new_form)


def test_a_published_config_is_used_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_1B))
    config = ModelConfig.from_hf(tmp_path)
    assert config == ModelConfig.from_hf(tmp_path / "config.json") == ModelConfig.from_hf(LLAMA_1B)
    assert config.num_parameters() == 1_235_814_400  # the model card says 1.23B
    assert config.rope_scaling == LLAMA_1B["rope_scaling"]


def test_silent_keys_take_the_values_transformers_assumes():
    minimal = {k: LLAMA_1B[k] for k in ("model_type", "vocab_size", "hidden_size", "intermediate_size")}
    config = ModelConfig.from_hf(minimal | {"num_hidden_layers": 2, "num_attention_heads": 32})
    assert (config.rms_norm_eps, config.max_position_embeddings, config.rope_theta) == (1e-6, 2048, 10000.0)
    assert (config.kv_heads, config.head_width, config.tie_word_embeddings) == (32, 64, False)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}}, "su"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, "beta"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary",
        ),
        ({"num_key_value_heads": 5}, "num_key_value_heads 5"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": 3}, "layer_types"),
    ],
)
def test_unsupported_configs_are_refused_by_name(change, named, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_1B | change))
    with pytest.raises(ValueError) as refusal:
        ModelConfig.from_hf(tmp_path)
    message = str(refusal.value)
    assert named in message
    assert str(tmp_path / "config.json") in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "keys",
    [
        {"unsloth_fixed": True, "unsloth_version": "2025.1"},
        {"max_sequence_length": 2048, "tokenizer_class": "LlamaTokenizer", "pretraining_tp": 2},
        {"do_sample": True, "temperature": 0.9, "top_p": 0.6, "max_length": 4096, "_name_or_path": "x"},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "finetuned": True}},
        {"a_key_that_nobody_knows": 3},
    ],
)
def test_keys_that_transformers_loads_and_ignores_are_left_out(keys):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 8}
    tree = LLAMA_1B | sizes | {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    tree = tree | {"pad_token_id": None, "rope_scaling": None} | keys
    config = ModelConfig.from_hf(tree)
    with torch.device("meta"):
        theirs = LlamaForCausalLM(LlamaConfig.from_dict(tree))
    assert sum(p.numel() for p in theirs.parameters()) == config.num_parameters()
    said = " ".join(left_out(tree, set(ModelConfig.model_fields)))
    assert all(key in said for key in keys if key != "rope_scaling")


VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2**70,
    0.5,
    "",
    "8",
    "x",
    [],
    [1],
    {},
    {"a": 1},
    {"rope_type": "yarn", "factor": "x"},
]
VALUES += [{"type": ["yarn"]}, {"rope_type": "longrope", "short_factor": 3, "long_factor": [1, None]}]
KEYS = sorted({*LLAMA_1B, *ModelConfig.model_fields, "rope_parameters", "layer_types", "max_window_layers"})


@given(
    st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES), min_size=1, max_size=3),
    st.sampled_from(["llama", "mistral", "qwen3"]),
)
def test_any_value_of_any_key_is_taken_or_refused_in_a_sentence(change, model_type):
    tree = LLAMA_1B | {"model_type": model_type, "use_sliding_window": True} | change
    try:
        config = ModelConfig.from_hf(tree)
    except ValueError as refusal:
        text = str(refusal)
    else:
        text = str(config.num_parameters())
    assert text


def test_unreadable_files_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        ModelConfig.from_hf(tmp_path)
    for content, complaint in (("{", "not valid JSON"), ("[]", "expected a JSON object")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=complaint):
            ModelConfig.from_hf(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 66},
        {"head_dim": 15},
        {"num_attention_heads": 3, "hidden_size": 48},
        {"vocab_size": 0},
        {"hidden_dim": 64},
        {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
        {"rope_scaling": {"rope_type": "nonsense"}},
    ],
)
def test_impossible_shapes_are_refused(change):
    with pytest.raises(ValidationError):
        tiny(**change)


@pytest.mark.parametrize(
    "change",
    [{"qk_norm": True, "mlp_bias": True}, {"sliding_window": 8, "attention_bias": True}],
)
def test_combinations_unknown_to_transformers_are_refused_at_export(change):
    with pytest.raises(ValueError, match="transformers has no architecture"):
        tiny(**change).to_hf()


def test_flops_of_the_window_never_exceed_those_of_full_attention():
    full, windowed = tiny(), tiny(sliding_window=8)
    weights = 6 * (full.num_parameters() - full.vocab_size * full.hidden_size - full.hidden_size)
    assert full.flops_per_token(0) == weights
    # two matrix products of T/2 keys on average, forward and twice backward, 2 operations a multiply-add
    assert full.flops_per_token(32) - weights == 3 * 2 * 2 * 16 * full.num_hidden_layers * 64
    assert windowed.flops_per_token(8) == full.flops_per_token(8)
    both = tiny(is_causal=False)
    assert both.flops_per_token(32) - weights == 2 * (full.flops_per_token(32) - weights)
    head = 6 * full.vocab_size * full.hidden_size
    assert both.flops_per_token(32, copies=2) - head == 2 * (both.flops_per_token(32) - head)
    chunked = tiny(is_causal=False, attention="chunked", chunk_size=4)
    assert full.flops_per_token(32) < chunked.flops_per_token(32) < both.flops_per_token(32)
    assert full.flops_per_token(4) < windowed.flops_per_token(1000) < full.flops_per_token(16)


def test_every_field_explains_itself():
    assert all(field.description for field in ModelConfig.model_fields.values())
