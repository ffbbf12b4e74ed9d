"""The shape of a model, in the field names of Hugging Face's `LlamaConfig`; conversion from and to `config.json`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator, model_validator

from .adapter_config import AdaptersConfig
from .hf.config import CHUNKED_PREFIX, MIXTURE_PREFIX, fields_from_hf, read_hf_config
from .visibility import Visibility

ROPE_KEYS = {
    # rope_type: (required keys, optional keys)
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "yarn": (
        {"factor"},
        {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    ),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, set()),
    "longrope": ({"short_factor", "long_factor"}, {"factor", "attention_factor"}),
}
MASKED_MODULE, MIXTURE_MODULE = "modeling_longform", "modeling_mixture"
"""Files in hf/ that have what transformers lacks."""
ROPE_EXTENDS_ORIGINAL = {"yarn", "llama3", "longrope"}
"""Scalings that take `original_max_position_embeddings` (default, as in transformers: `max_position_embeddings`)."""


class ModelConfig(BaseModel):
    """A LLaMA decoder: RMSNorm, RoPE, SwiGLU, grouped-query attention. `from_hf` takes a `config.json` as it is."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)

    vocab_size: PositiveInt
    """Number of token ids, which is the number of rows of the embedding."""
    hidden_size: PositiveInt
    """Width of the residual stream."""
    intermediate_size: PositiveInt
    """Width inside the SwiGLU feed-forward layer."""
    num_hidden_layers: PositiveInt
    """Number of decoder blocks."""
    num_attention_heads: PositiveInt
    """Number of query heads."""
    num_key_value_heads: PositiveInt | None = None
    """Number of key/value heads, a divisor of the query heads (1: multi-query attention). Default: as many."""
    head_dim: PositiveInt | None = None
    """Width of one head, even. Default: hidden_size / num_attention_heads."""
    max_position_embeddings: PositiveInt = 4096
    """Longest document, in tokens, that the positions are made for."""
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the mean square inside RMSNorm."""
    position_embedding: Literal["rope", "sinusoidal", "learned"] = "rope"
    """How a token knows its place in its document: queries and keys turned by rotary angles, fixed sinusoids added to the
    embedding (Vaswani et al. 2017), or the rows of a trained table added to it (GPT-2). transformers has the first only."""
    rope_theta: float = Field(default=10000.0, gt=1)
    """Base of the rotary frequencies; larger for longer contexts."""
    rope_scaling: dict[str, Any] | None = None
    """Rotary scaling as in Hugging Face configs: {rope_type: linear|dynamic|yarn|llama3|longrope, factor: ..., ...}."""
    tie_word_embeddings: bool = False
    """Whether the output head is the embedding matrix."""
    attention_bias: bool = False
    """Whether the four attention projections have biases."""
    mlp_bias: bool = False
    """Whether the three feed-forward projections have biases."""
    initializer_range: float = Field(default=0.02, gt=0)
    """Standard deviation of initial weights; a block's output projections get it over sqrt(2 * num_hidden_layers)."""
    qk_norm: bool = False
    """RMSNorm over each query and key head before the rotation (as in Qwen3)."""
    sliding_window: PositiveInt | None = None
    """Number of latest tokens, itself included, that a token attends to. Default: its whole document so far."""
    attention: Literal["full", "chunked"] = "full"
    """`chunked`: documents are cut into chunks; a token sees its own and all earlier chunks of its document. A causal
    model keeps the order inside the chunk too, so that both are the same function there."""
    chunk_size: PositiveInt | None = None
    """Tokens of a chunk of `chunked` attention."""
    is_causal: bool = True
    """Whether a token sees no later one. A recipe's objective decides: false for `masked` and `block_diffusion`."""
    adapters: AdaptersConfig = AdaptersConfig()
    """Low-rank updates beside the matrices of the blocks. A recipe's section `adapters` decides."""

    @field_validator("rope_scaling")
    @classmethod
    def _rope_scaling_is_known(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if value is None else _checked_rope_scaling(value)

    @model_validator(mode="after")
    def _shapes_fit(self) -> ModelConfig:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.kv_heads}"
            )
        rotary = self.position_embedding == "rope"
        for key in ("rope_scaling", "rope_theta"):
            if not rotary and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key} has no meaning with position_embedding {self.position_embedding}: remove it, or set "
                    "position_embedding to rope"
                )
        if rotary and self.head_width % 2:
            raise ValueError(f"head_dim {self.head_width} is odd: rotary positions turn pairs of channels")
        for key in ("short_factor", "long_factor"):
            factors = (self.rope_scaling or {}).get(key)
            if factors is not None and len(factors) != self.head_width // 2:
                raise ValueError(
                    f"rope_scaling.{key} has {len(factors)} entries, head_dim / 2 = {self.head_width // 2}"
                )
        return self

    @model_validator(mode="after")
    def _adapters_fit(self) -> ModelConfig:
        for name in self.adapters.names:
            for target, shape in self._adapted_shapes().items():
                if (rank := self.adapters.rank(name)) > min(shape):
                    raise ValueError(f"adapters.r {rank} is above the rank {min(shape)} of {target}: use at most that")
        if (self.adapters.last_layers or 0) > self.num_hidden_layers:
            raise ValueError(
                f"adapters.last_layers {self.adapters.last_layers} but there are {self.num_hidden_layers} layers"
            )
        return self

    @model_validator(mode="after")
    def _attention_is_whole(self) -> ModelConfig:
        if (self.attention == "chunked") != (self.chunk_size is not None):
            raise ValueError("attention: chunked and chunk_size belong together: give both or neither")
        if not self.is_causal and self.sliding_window is not None:
            raise ValueError("sliding_window is for causal models: use attention: chunked, or a causal objective")
        return self

    @property
    def visibility(self) -> Visibility:
        """Which tokens a token attends to."""
        return Visibility(1 if self.is_causal else self.chunk_size, self.sliding_window)

    @property
    def kv_heads(self) -> int:
        """Key/value heads, with the default filled in."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_width(self) -> int:
        """Width of one head, with the default filled in."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def num_parameters(self) -> int:
        """Of base and adapters; a tied embedding counts once."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        if self.position_embedding == "learned":
            embeddings += self.max_position_embeddings * self.hidden_size
        base = embeddings + self.num_hidden_layers * self._block_parameters() + self.hidden_size
        return base + self.num_adapter_parameters()

    def num_adapter_parameters(self) -> int:
        """Of all adapters together."""
        return sum(self.num_parameters_of_adapter(name) for name in self.adapters.names)

    def num_trained_parameters(self) -> int:
        """Those that an optimizer has."""
        return self.num_adapter_parameters() if self.adapters.freeze_base else self.num_parameters()

    def flops_per_token(self, context: float, copies: int = 1) -> float:
        """Floating-point operations of one training step (forward and backward) per token.

        `context` is the length, in tokens, of the documents that attention runs over: under the causal mask a token
        sees half of it on average. `copies` of each token pass through the blocks, one through the head. Recomputation
        by activation checkpointing is not counted, as is usual for MFU (Chowdhery et al. 2022, PaLM, appendix B; there
        the causal mask is not discounted). A frozen base has no gradients of weights, and below the first adapter no backward
        pass at all, not into what the first adapted block reads either. A token has one adapter; of a mixture it has all from
        the first adapted block on, and passes the head twice; in mode hard it has all without gradients first.
        """
        seen = context / 2 if self.is_causal else self.visibility.pairs(context) / max(context, 1)
        if self.sliding_window is not None and self.sliding_window < context:
            seen = self.sliding_window - self.sliding_window**2 / (2 * context)
        attention = 2 * seen * self.num_attention_heads * self.head_width
        head, weights, adapters = self.vocab_size * self.hidden_size, self._block_parameters(), self.adapters
        of_adapters = [self.num_parameters_of_adapter(name) for name in adapters.names] or [0]
        above = len(adapters.adapted_layers(self.num_hidden_layers)) or self.num_hidden_layers
        below = (self.num_hidden_layers - above) * (weights + attention)
        passes = 4.0 if adapters.freeze_base else 6.0
        trunk = (2.0 if adapters.freeze_base else 6.0) * below
        once = above * (passes * weights + 6.0 * attention) + passes * head
        if adapters.freeze_base:
            shapes = self._projection_shapes()
            once -= 2.0 * sum(math.prod(shapes[name]) for name in ("q_proj", "k_proj", "v_proj"))
        if adapters.mode == "mixture" and adapters.names:
            return trunk + len(of_adapters) * (once + 2.0 * head) + 6.0 * sum(of_adapters)
        total = copies * (trunk + once - passes * head) + passes * head + 6.0 * max(of_adapters)
        if adapters.members:
            chosen = below + len(of_adapters) * (above * (weights + attention) + head) + sum(of_adapters)
            total += 2.0 * chosen
        return total

    def _projection_shapes(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the linear maps of a block."""
        d, f, width = self.hidden_size, self.intermediate_size, self.head_width
        heads, kv = self.num_attention_heads * width, self.kv_heads * width
        attention = {"q_proj": (d, heads), "k_proj": (d, kv), "v_proj": (d, kv), "o_proj": (heads, d)}
        return attention | {"gate_proj": (d, f), "up_proj": (d, f), "down_proj": (f, d)}

    def _block_parameters(self) -> int:
        total = 2 * self.hidden_size
        for name, (inputs, outputs) in self._projection_shapes().items():
            bias = self.attention_bias if name[0] in "qkvo" else self.mlp_bias
            total += (inputs + bias) * outputs
        return total + self.qk_norm * 2 * self.head_width

    def _adapted_shapes(self) -> dict[str, tuple[int, int]]:
        """Of the linear maps that have adapters."""
        shapes = self._projection_shapes()
        return {name: shapes[name] for name in self.adapters.target_modules}

    def num_parameters_of_adapter(self, name: str) -> int:
        """Of the adapter with this name."""
        of_block = self.adapters.rank(name) * sum(map(sum, self._adapted_shapes().values()))
        return of_block * len(self.adapters.adapted_layers(self.num_hidden_layers))

    @classmethod
    def from_hf(cls, source: str | Path | dict[str, Any]) -> ModelConfig:
        """Read a Hugging Face config: a folder with `config.json`, that file, or its content.

        Accepts `llama`, `mistral` and `qwen3`, in the form of transformers 4 (`rope_theta`, `rope_scaling`) and of
        transformers 5 (`rope_parameters`). Raises ValueError that names each key that would change the function.
        """
        tree, where = read_hf_config(source)
        try:
            return cls(**fields_from_hf(tree, set(cls.model_fields)))
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'model'}: {e['msg']}" for e in error.errors())
            raise ValueError(f"{where}: {problems}") from None
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    def to_hf(self, token_ids: dict[str, int | None] | None = None) -> dict[str, Any]:
        """`config.json` content that transformers 4 and 5 load.

        `token_ids`: `bos_token_id`, `eos_token_id`, `pad_token_id` of the tokenizer. The architecture is
        LlamaForCausalLM; with `qk_norm` Qwen3ForCausalLM; with `sliding_window` alone MistralForCausalLM. Of models that
        are not causal, modeling_longform.py, which `hf.weights.save_hf` puts into the folder, makes the first two masked language
        models, and adds `chunked` attention; modeling_mixture.py mixes adapters that all have a turn. Raises ValueError where
        no architecture has the combination.
        """
        if self.position_embedding != "rope":
            raise ValueError(
                f"transformers has no LLaMA with {self.position_embedding} positions: only models with position_embedding "
                "rope can be exported"
            )
        if self.qk_norm:
            architecture, model_type, unavailable = "Qwen3ForCausalLM", "qwen3", {"mlp_bias": self.mlp_bias}
        elif self.sliding_window is not None:
            unavailable = {"attention_bias": self.attention_bias, "mlp_bias": self.mlp_bias}
            architecture, model_type = "MistralForCausalLM", "mistral"
        else:
            architecture, model_type, unavailable = "LlamaForCausalLM", "llama", {}
        for key, used in unavailable.items():
            if used:
                reason = "qk_norm" if self.qk_norm else "sliding_window"
                raise ValueError(f"transformers has no architecture with both {reason} and {key}: set {key} to false")
        rope = {"rope_theta": self.rope_theta, "rope_type": "default", **(self.rope_scaling or {})}
        if rope["rope_type"] in ROPE_EXTENDS_ORIGINAL:
            rope.setdefault("original_max_position_embeddings", self.max_position_embeddings)
        ours = {"qk_norm", "sliding_window", "rope_scaling", "position_embedding", "adapters"}
        of_masked = {"attention", "chunk_size", "is_causal"}
        fields = self.model_dump(exclude=ours | of_masked)
        if not self.is_causal:
            fields |= self.model_dump(include=of_masked, exclude_none=True)
        fields |= {"num_key_value_heads": self.kv_heads, "head_dim": self.head_width, "hidden_act": "silu"}
        fields |= {"rope_parameters": rope}
        if self.rope_scaling:
            fields["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        if model_type != "llama":
            fields["sliding_window"] = self.sliding_window
        if model_type == "qwen3":
            fields |= {"use_sliding_window": self.sliding_window is not None, "max_window_layers": 0}
        fields = {key: value for key, value in fields.items() if not (model_type != "llama" and key == "mlp_bias")}
        if model_type == "mistral":
            del fields["attention_bias"]
        if not self.is_causal:
            name, auto = architecture.removesuffix("ForCausalLM"), {}
            if self.attention == "chunked":
                name, model_type = f"Chunked{name}", f"{CHUNKED_PREFIX}{model_type}"
                architecture, auto["AutoConfig"] = f"{name}ForMaskedLM", f"{name}Config"
            auto["AutoModelForMaskedLM"] = f"{name}ForMaskedLM"
            fields["auto_map"] = {key: f"{MASKED_MODULE}.{value}" for key, value in auto.items()}
        if self.adapters.members:
            name, model_type = f"Mixture{architecture.removesuffix('ForCausalLM')}", f"{MIXTURE_PREFIX}{model_type}"
            architecture, auto = f"{name}ForCausalLM", {"AutoConfig": f"{name}Config"}
            auto["AutoModelForCausalLM"] = architecture
            fields["auto_map"] = {key: f"{MIXTURE_MODULE}.{value}" for key, value in auto.items()}
            fields["adapters"] = self.adapters.of_mixture()
        ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | (token_ids or {})
        # keys and values of tokens that will see later ones cannot be kept
        fields |= {"architectures": [architecture], "model_type": model_type, "use_cache": self.is_causal}
        return fields | ids


def _checked_rope_scaling(scaling: dict[str, Any]) -> dict[str, Any] | None:
    """The scaling with `type` renamed to `rope_type`; None for the default; ValueError names a wrong key."""
    scaling = {key: value for key, value in scaling.items() if value is not None}
    kind = scaling.pop("type", None)
    kind = scaling.pop("rope_type", kind)
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise ValueError(f"rope_type {kind!r} is unknown; one of {', '.join(ROPE_KEYS)}")
    required, optional = ROPE_KEYS[kind]
    if kind in ROPE_EXTENDS_ORIGINAL:
        optional = optional | {"original_max_position_embeddings"}
    if missing := required - scaling.keys():
        raise ValueError(f"rope_type {kind} needs {', '.join(sorted(missing))}")
    if unknown := scaling.keys() - required - optional:
        raise ValueError(f"rope_type {kind} has no {', '.join(sorted(unknown))}")
    for key, value in scaling.items():
        numbers = value if isinstance(value, list) and key in ("short_factor", "long_factor") else [value]
        if any(isinstance(x, bool) != (key == "truncate") or not isinstance(x, int | float) for x in numbers):
            raise ValueError(f"{key} must be {'true or false' if key == 'truncate' else 'a number'}, got {value!r}")
    return None if kind == "default" else {"rope_type": kind, **scaling}
