"""Hugging Face's `config.json`, read as transformers reads it: what changes the function is refused, the rest left out."""

import json
import re
from pathlib import Path
from typing import Any

CHUNKED_PREFIX, MIXTURE_PREFIX = "chunked_", "mixture_"
"""What the `model_type`s of modeling_longform.py and modeling_mixture.py add to those of transformers."""
_REQUIRED_VALUES = {
    # keys of Hugging Face configs that this model supports with one value only
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0, None),
    "rope_interleaved": (False, None),
    "partial_rotary_factor": (1, None),
    "is_encoder_decoder": (False,),
    "quantization_config": (None,),
}
CHANGES_THE_FUNCTION = re.compile(
    r"(^|_)(multiplier|softcap(ping)?|logit_scale|experts?|adapters?|lora|quant\w*|parallel_residual|alibi|sinks?|clip_qkv|"
    r"layernorm|residual_scale|scale_emb|scale_depth|dim_model_base|no_rope\w*|linear_attn\w*|mup)(_|$)"
)
"""Names of what other architectures compute beside a LLaMA's function."""
ROPE_LEGACY_KEYS = {"finetuned"}
"""Of old configs; transformers loads and ignores them."""
# fmt: off
USED_OR_OURS = {
    "model_type", "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id", "objective",
    "layer_types", "max_window_layers", "use_sliding_window", "rope_parameters", "rope_scaling",
    "ignore_keys_at_rope_validation",
}
OF_TRANSFORMERS = {
    "chunk_size_feed_forward", "dtype", "id2label", "label2id", "name_or_path", "output_attentions", "problem_type",
    "output_hidden_states", "return_dict", "sep_token_id", "torch_dtype", "transformers_version", "use_cache", "auto_map",
    "transformers.js_config", "is_llama_config", "pretraining_tp", "tokenizer_class", "unsloth_version", "unsloth_fixed",
    "max_sequence_length", "do_sample", "temperature", "top_p", "top_k", "max_length", "min_length", "repetition_penalty",
    "num_beams", "num_return_sequences", "no_repeat_ngram_size", "length_penalty", "early_stopping", "typical_p",
    "bad_words_ids", "prefix", "decoder_start_token_id", "torchscript", "model_max_length", "generation_config",
}
# fmt: on
"""Loaded by transformers' LlamaConfig without a meaning for what the model computes."""


def read_hf_config(source: str | Path | dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The content of a folder's `config.json`, of that file, or as given; and what to call it in a message."""
    if isinstance(source, dict):
        return source, "config"
    path = Path(source)
    path = path / "config.json" if path.is_dir() else path
    try:
        tree = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give a Hugging Face folder or its config.json") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return tree, str(path)


def left_out(hf: dict[str, Any], known: set[str]) -> list[str]:
    """Sentences about keys that are not taken over: those without meaning here, and those that nobody here knows."""
    rest = {key for key, value in hf.items() if value is not None} - known - USED_OR_OURS - _REQUIRED_VALUES.keys()
    without_meaning = sorted(key for key in rest if key in OF_TRANSFORMERS or key.startswith("_"))
    unknown = sorted(key for key in rest - set(without_meaning) if hf[key] is not False)
    said = [f"{', '.join(without_meaning)}: left out, without meaning for the architecture"] if without_meaning else []
    return said + ([f"{', '.join(unknown)}: unknown here and left out"] if unknown else [])


def fields_from_hf(hf: dict[str, Any], known: set[str]) -> dict[str, Any]:
    """The fields of a `ModelConfig`, whose names are `known`, in a `config.json`. Raises ValueError for another model."""
    model_type = hf.get("model_type")
    if isinstance(model_type, str) and hf.get("chunk_size") is not None:
        model_type = model_type.removeprefix(CHUNKED_PREFIX)
    if isinstance(model_type, str) and hf.get("adapters") is not None:
        model_type = model_type.removeprefix(MIXTURE_PREFIX)
    if model_type not in ("llama", "mistral", "qwen3"):
        raise ValueError(f"model_type {model_type!r} is not supported; llama, mistral or qwen3 is")
    changing = sorted(
        key for key, value in hf.items() if key not in known and value and CHANGES_THE_FUNCTION.search(key)
    )
    if changing := [key for key in changing if key not in _REQUIRED_VALUES]:
        raise ValueError(f"this model has no equivalent for {', '.join(changing)}, which would change what is computed")
    for key, allowed in _REQUIRED_VALUES.items():
        if key in hf and not any(hf[key] == value for value in allowed):
            raise ValueError(f"{key} {hf[key]!r} is not supported; {allowed[0]!r} is")
    given = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise ValueError(f"rope_scaling must be an object with keys, got {given!r}")
    rope = {key: value for key, value in given.items() if key not in ROPE_LEGACY_KEYS}
    if rope.pop("partial_rotary_factor", 1) != 1:
        raise ValueError("rope_parameters.partial_rotary_factor is not supported")
    fields = {key: hf[key] for key in known if hf.get(key) is not None}
    fields["rope_theta"] = rope.pop("rope_theta", None) or hf.get("rope_theta") or 10000.0
    fields["rope_scaling"] = {"rope_type": rope.pop("type", "default"), **rope} if rope else None
    # what transformers assumes where a config is silent
    defaults = {"rms_norm_eps": 1e-6, "max_position_embeddings": {"llama": 2048, "mistral": 131072, "qwen3": 32768}}
    defaults = {key: value[model_type] if isinstance(value, dict) else value for key, value in defaults.items()}
    fields = defaults | fields | {"qk_norm": model_type == "qwen3"}
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if key not in fields:
            raise ValueError(f"{key} is missing")
    if model_type == "mistral" and "sliding_window" not in hf:
        fields["sliding_window"] = 4096
    if model_type == "mistral" and "num_key_value_heads" not in hf:
        fields["num_key_value_heads"] = 8
    if model_type == "qwen3":
        if type(fields["num_hidden_layers"]) is not int:
            raise ValueError(f"num_hidden_layers must be a whole number, got {fields['num_hidden_layers']!r}")
        fields |= _qwen3_window(hf, fields)
        fields.setdefault("head_dim", 128)
    return fields


def _qwen3_window(hf: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Qwen3 may put the window on some layers only; this model has it on all or none."""
    if not hf.get("use_sliding_window"):
        return {"sliding_window": None}
    layers = fields["num_hidden_layers"]
    first = hf.get("max_window_layers", 28)
    listed = hf.get("layer_types")
    if (
        type(first) is not int
        or not isinstance(listed, list | None)
        or not all(isinstance(k, str) for k in listed or ())
    ):
        raise ValueError("max_window_layers must be a whole number and layer_types a list of names")
    kinds = hf.get("layer_types") or ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    if len(set(kinds)) > 1:
        raise ValueError("layer_types mixes full and sliding attention, which is not supported")
    return {"sliding_window": hf.get("sliding_window", 4096) if kinds[0] == "sliding_attention" else None}
