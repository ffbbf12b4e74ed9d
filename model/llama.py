"""The model: an ordered list of layers, one tensor in, one tensor out. `Llama` is a for-loop over that list.

Legend: B batch, T tokens of a row, D model, K key/value heads, d head width, F feed-forward, V vocabulary.
Parameter names are those of transformers' LlamaForCausalLM without the prefix `model.`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .adapter_config import AdaptersConfig
from .adapters import adapted
from .attention import KeyValueCache, attend, attend_cached
from .compiled import uncompiled
from .config import ModelConfig
from .documents import Documents
from .head_loss import HeadLoss
from .loss import linear_cross_entropy
from .norm import rms_norm
from .positions import POSITION_LAYERS
from .rope import rotary_tables, rotate
from .seeded import Linear, Seed, multiply


class Embedding(nn.Module):
    """Token ids [B, T] -> vectors [B, T, D]."""

    def __init__(self, config: ModelConfig, seed: Seed) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        seed.normal_(self.weight, "weight", config.initializer_range)

    def forward(self, input_ids: Tensor, documents: Documents | None = None) -> Tensor:
        return F.embedding(input_ids, self.weight)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, statistics in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor, documents: Documents | None = None) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, inside documents. [B, T, D] -> [B, T, D]."""

    def __init__(self, config: ModelConfig, seed: Seed) -> None:
        super().__init__()
        self.config = config
        self.attend: Callable[..., Tensor] = attend  # around these two ranks exchange what they share
        self.multiply = multiply
        d, width, bias, std = config.head_width, config.hidden_size, config.attention_bias, config.initializer_range
        heads, kv_heads = config.num_attention_heads * d, config.kv_heads * d
        out_std = std / math.sqrt(2 * config.num_hidden_layers)
        self.q_proj = Linear(width, heads, bias, std, seed, "self_attn.q_proj")
        self.k_proj = Linear(width, kv_heads, bias, std, seed, "self_attn.k_proj")
        self.v_proj = Linear(width, kv_heads, bias, std, seed, "self_attn.v_proj")
        self.o_proj = Linear(heads, width, bias, out_std, seed, "self_attn.o_proj")
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(d, config.rms_norm_eps), RMSNorm(d, config.rms_norm_eps)

    def forward(self, x: Tensor, documents: Documents, cache: KeyValueCache | None = None) -> Tensor:
        tables = rotary_tables(self.config, documents) if self.config.position_embedding == "rope" else None
        projected = self.multiply(x, documents, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (each.unflatten(-1, (-1, self.config.head_width)) for each in projected)  # the heads that are here
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if tables is not None:
            q, k = rotate(q, *tables), rotate(k, *tables)
        return self.o_proj(self._mix(q, k, v, documents, cache).flatten(2), documents)

    @uncompiled  # the number of documents and their lengths change with every batch
    def _mix(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, cache: KeyValueCache | None) -> Tensor:
        if cache is not None:
            k, v = cache.append(k, v)
        if k.shape[1] == q.shape[1]:
            return self.attend(q, k, v, documents, self.config.visibility)
        return attend_cached(q, k, v, self.config.visibility)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020). [B, T, D] -> [B, T, D] through width F."""

    def __init__(self, config: ModelConfig, seed: Seed) -> None:
        super().__init__()
        self.multiply, width, inner = multiply, config.hidden_size, config.intermediate_size
        bias, std = config.mlp_bias, config.initializer_range
        self.gate_proj = Linear(width, inner, bias, std, seed, "mlp.gate_proj")
        self.up_proj = Linear(width, inner, bias, std, seed, "mlp.up_proj")
        self.down_proj = Linear(
            inner, width, bias, std / math.sqrt(2 * config.num_hidden_layers), seed, "mlp.down_proj"
        )

    def forward(self, x: Tensor, documents: Documents) -> Tensor:
        gate, up = self.multiply(x, documents, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up, documents)


class Block(nn.Module):
    """One decoder layer: x + attention(norm(x)), then x + feed_forward(norm(x)). [B, T, D] -> [B, T, D]."""

    def __init__(self, config: ModelConfig, seed: Seed) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, seed)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config, seed)

    def forward(self, x: Tensor, documents: Documents, cache: KeyValueCache | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), documents, cache)
        return x + self.mlp(self.post_attention_layernorm(x), documents)


class Head(nn.Module):
    """Output projection: [B, T, D] -> logits [B, T, V], or with targets what `HeadLoss` makes of them.

    The loss is inside this module's forward so that ZeRO-3, which gathers a module's parameters around its forward,
    has the weight in place. A tied head owns no weight: it is given the embedding's.
    """

    weight: nn.Parameter

    def __init__(self, config: ModelConfig, seed: Seed) -> None:
        super().__init__()
        self.loss = HeadLoss(config.adapters)
        if config.tie_word_embeddings:
            self.register_parameter("weight", None)
        else:
            self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
            seed.normal_(self.weight, "weight", config.initializer_range)

    def forward(
        self,
        x: Tensor,
        documents: Documents | None = None,
        targets: Tensor | None = None,
        z_loss_weight: float = 0.0,
        target_weights: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if targets is None:
            return F.linear(x, self.weight)
        entropy = partial(linear_cross_entropy, weight=self.weight)
        return self.loss(entropy, x, documents, targets, z_loss_weight, target_weights)


@dataclass(frozen=True)
class Layer:
    """One entry of the plan: what to build, and the name of its parameters' prefix in the whole model."""

    index: int
    name: str
    cls: type[nn.Module]
    kwargs: dict[str, Any] = field(default_factory=dict)
    seeded: bool = True
    tied_to: str | None = None
    """Name of the layer whose `weight` this one uses."""
    frozen: bool = False
    """Whether nothing of it is trained but its adapters."""
    adapters: AdaptersConfig | None = None

    def build(self, seed: int) -> nn.Module:
        """The layer with its initial weights, which depend on nothing but (seed, index), and on an adapter's name."""
        extra = {"seed": Seed(seed, self.index)} if self.seeded else {}
        layer = self.cls(**self.kwargs, **extra).requires_grad_(not self.frozen)
        return adapted(layer, self.adapters, Seed(seed, self.index))


def layer_plan(config: ModelConfig) -> list[Layer]:
    """The model as data: embedding, positions unless they are rotary, blocks, final norm, head.

    Every layer is called as `x = layer(x, documents)`.
    """
    of_config = {"config": config}
    norm = {"width": config.hidden_size, "eps": config.rms_norm_eps}
    entries: list[tuple[Any, ...]] = [("embed_tokens", Embedding, of_config)]
    if config.position_embedding != "rope":
        layer = POSITION_LAYERS[config.position_embedding]
        entries.append(("embed_positions", layer, of_config, config.position_embedding == "learned"))
    entries += [(f"layers.{i}", Block, of_config) for i in range(config.num_hidden_layers)]
    plan = [Layer(index, *entry) for index, entry in enumerate(entries)]
    plan.append(Layer(len(plan), "norm", RMSNorm, norm, seeded=False))
    tied_to = "embed_tokens" if config.tie_word_embeddings else None
    plan.append(Layer(len(plan), "lm_head", Head, of_config, tied_to=tied_to))
    of_blocks = {f"layers.{i}": config.adapters for i in config.adapters.adapted_layers(config.num_hidden_layers)}
    return [replace(each, frozen=config.adapters.freeze_base, adapters=of_blocks.get(each.name)) for each in plan]


def is_recomputed(block: int, config: ModelConfig, chosen: bool | int) -> bool:
    """Whether the block with this number is, where all are (True), or so many, spread evenly over the model."""
    blocks = config.num_hidden_layers
    number = blocks if chosen is True else int(chosen)
    return (block + 1) * number // blocks > block * number // blocks


class Llama(nn.Module):
    """The whole model in one process's memory (or ZeRO's); pipelines are built from `layer_plan` instead."""

    activation_checkpointing: bool | int = False
    """Recompute blocks in backward instead of keeping their activations: see `is_recomputed`. Set by the engine."""
    embed_tokens: Embedding
    embed_positions: nn.Module
    norm: RMSNorm
    lm_head: Head

    def __init__(
        self, config: ModelConfig, seed: int = 0, build: Callable[[Layer, int], nn.Module] = Layer.build
    ) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList()
        for layer in layer_plan(config):
            module = build(layer, seed)
            if layer.cls is Block:
                self.layers.append(module)
            else:
                self.add_module(layer.name, module)
            if layer.tied_to is not None:
                module.weight = self.get_submodule(layer.tied_to).weight

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        targets: Tensor | None = None,
        z_loss_weight: float = 0.0,
        columns: slice | Tensor = slice(None),
        target_weights: Tensor | None = None,
        copies: int = 1,
        adapters: Tensor | None = None,
        sources: Tensor | None = None,
        seeds: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, T, V]; with `targets` [B, T] objective and sums of `HeadLoss`.

        `input_ids` int64 [B, T]. `position_ids` int64 [B, T] restart at 0 where a document starts (default: a row is one), on the
        CPU to save a synchronisation. `columns`: the part of every row that `input_ids` and `targets` are, where devices share
        rows; `position_ids` are whole. `target_weights` [B, T]: what each counts. `copies`, `sources`, `seeds`: see `Documents`.
        `adapters` int64 [B]: places in the model's names; without, all members of the mixture have a turn, or the base alone."""
        if position_ids is None:
            documents = Documents.whole_rows(len(input_ids), input_ids.shape[1], input_ids.device)
        else:
            documents = Documents.from_position_ids(position_ids, input_ids.device, copies).part(columns)
        documents.route(adapters, self.config.adapters.members, sources, seeds)
        return self.lm_head(self.hidden_states(input_ids, documents), documents, targets, z_loss_weight, target_weights)

    def embed(self, input_ids: Tensor, documents: Documents) -> Tensor:
        """What the first block sees, [B, T, D], for the tokens `input_ids` [B, T] of `documents`."""
        x = self.embed_tokens(input_ids, documents)
        return x if self.config.position_embedding == "rope" else self.embed_positions(x, documents)

    def hidden_states(self, input_ids: Tensor, documents: Documents) -> Tensor:
        """What the head sees, [B, T, D], for the tokens `input_ids` [B, T] of `documents`."""
        x = self.embed(input_ids, documents)
        for number, block in enumerate(self.layers):
            if is_recomputed(number, self.config, self.activation_checkpointing) and torch.is_grad_enabled():
                x = checkpoint(block, x, documents, use_reentrant=False)
            else:
                x = block(x, documents)
        return self.norm(x)
