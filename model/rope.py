"""Rotary positions (Su et al. 2021) and their context extensions, computed as transformers 5 computes them.

Nothing here is a module or a buffer: the tables are made in float32 from the config at each forward and shared by all
layers, so no cast of the model, `zero.Init` or meta device can touch them.

Legend: B batch, T tokens, H heads, d head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .compiled import uncompiled
from .config import ModelConfig
from .documents import Documents


def rope_depends_on_length(config: ModelConfig) -> bool:
    """Whether the frequencies change with the length of the document."""
    return config.rope_scaling is not None and config.rope_scaling["rope_type"] in ("dynamic", "longrope")


@uncompiled  # made once a forward, by whichever layer comes first
def rotary_tables(config: ModelConfig, documents: Documents) -> tuple[Tensor, Tensor]:
    """cos [B, T, 1, d] and sin [B, T, 1, d / 2] of every token's angles, float32, times the scaling's attention factor.

    cos comes twice in a row, so that `rotate` multiplies the whole head at once.

    Where transformers takes the longest sequence of the batch to choose frequencies (`dynamic`, `longrope`), the
    length of each token's own document is taken: a packed row then equals its documents alone.
    """
    if documents.rotary is None:
        frequencies, factor = _frequencies_of_tokens(config, documents)
        angles = documents.position_ids.unsqueeze(-1).float() * frequencies
        cos, sin = ((f(angles) * factor).unsqueeze(2) for f in (torch.cos, torch.sin))
        documents.rotary = torch.cat([cos, cos], dim=-1), sin
    return documents.rotary


def _frequencies_of_tokens(config: ModelConfig, documents: Documents) -> tuple[Tensor, float]:
    """The frequencies that all tokens share, [d / 2], or those of each token's document, [B, T, d / 2]."""
    device = documents.position_ids.device
    if not rope_depends_on_length(config):
        return inverse_frequencies(config, 0, device)
    distinct = sorted(set(documents.lengths))
    tables, factors = zip(*(inverse_frequencies(config, length, device) for length in distinct), strict=True)
    place = torch.searchsorted(torch.tensor(distinct, device=device), documents.length_of_each_token())
    return torch.stack(tables)[place], factors[0]


def inverse_frequencies(config: ModelConfig, length: int, device: torch.device | None = None) -> tuple[Tensor, float]:
    """Float32 frequencies [d / 2] for a document of `length` tokens, and the factor on cos and sin."""
    scaling = config.rope_scaling or {"rope_type": "default"}
    kind, dim, theta = scaling["rope_type"], config.head_width, config.rope_theta
    original = scaling.get("original_max_position_embeddings", config.max_position_embeddings)
    if kind == "dynamic":
        growth = scaling["factor"] * max(length, original) / original - (scaling["factor"] - 1)
        theta *= growth ** (dim / (dim - 2))
    inverse = 1.0 / theta ** (torch.arange(0, dim, 2, device=device).float() / dim)
    if kind in ("default", "dynamic"):
        return inverse, 1.0
    if kind == "linear":
        return inverse / scaling["factor"], 1.0
    if kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor")
        return _llama3(inverse, original, *(scaling[key] for key in keys)), 1.0
    if kind == "yarn":
        return _yarn(inverse, theta, original, scaling)
    assert kind == "longrope", kind
    factors = scaling["long_factor" if length > original else "short_factor"]
    extension = scaling.get("factor", config.max_position_embeddings / original)
    default = math.sqrt(1 + math.log(extension) / math.log(original)) if extension > 1 else 1.0
    return inverse / torch.tensor(factors, device=device).float(), scaling.get("attention_factor", default)


def frequencies_of_length(config: ModelConfig, length: int) -> tuple[float, ...]:
    """What cached keys depend on: the frequencies where they change with the length (the cache is then filled anew)."""
    return tuple(inverse_frequencies(config, length)[0].tolist()) if rope_depends_on_length(config) else ()


def _llama3(inverse: Tensor, original: int, factor: float, low_freq_factor: float, high_freq_factor: float) -> Tensor:
    """Long wavelengths divided by `factor`, short ones kept, a linear blend between (Llama 3.1 model card)."""
    blend = (original * inverse / (2 * math.pi) - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * inverse / factor + blend * inverse


def _yarn(inverse: Tensor, theta: float, original: int, scaling: dict) -> tuple[Tensor, float]:
    """NTK-by-parts interpolation with attention temperature (Peng et al. 2023, YaRN, sections 3.2 and 3.4)."""
    factor, dim = scaling["factor"], 2 * len(inverse)

    def channel(rotations: float) -> float:
        """The channel whose angle makes that many turns over the original context."""
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = channel(scaling.get("beta_fast") or 32), channel(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high += 0.001 * (low == high)
    interpolated = ((torch.arange(dim // 2, device=inverse.device).float() - low) / (high - low)).clamp(0, 1)

    def temperature(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, mscale_all = scaling.get("mscale"), scaling.get("mscale_all_dim")
    default = temperature(mscale) / temperature(mscale_all) if mscale and mscale_all else temperature(1)
    return inverse / factor * interpolated + inverse * (1 - interpolated), scaling.get("attention_factor", default)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel i with channel i + d / 2 by the angle of the token. `x` [B, T, H, d] -> the same shape and dtype."""
    return _Rotation.apply(x, cos, sin)


class _Rotation(torch.autograd.Function):
    """A rotation is linear: its gradient is the rotation by the opposite angle, and nothing of `x` is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    (x1, x2), out = wide.chunk(2, -1), wide * cos
    out1, out2 = out.chunk(2, -1)
    out1.addcmul_(x2, sin, value=-1)
    out2.addcmul_(x1, sin)
    return out.to(x.dtype)
