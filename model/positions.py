"""Positions added to the token embeddings, X' = X + P, where they are not rotary (model/rope.py).

Positions restart at 0 in each document of a packed row. Legend: B batch, T tokens of a row, D model, P positions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .documents import Documents
from .seeded import Seed


class SinusoidalPositionEmbedding(nn.Module):
    """x * sqrt(D) + sinusoids of the position (Vaswani et al. 2017, sections 3.4 and 3.5); no parameters.

    The factor, which is the paper's, brings embeddings drawn with a small standard deviation to the size of the sines.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.scale = math.sqrt(config.hidden_size)

    def forward(self, x: Tensor, documents: Documents) -> Tensor:
        table = sinusoids(documents.position_ids, x.shape[-1])
        return torch.add(table, x, alpha=self.scale).to(x.dtype)


def sinusoids(position_ids: Tensor, width: int) -> Tensor:
    """sin(p / 10000^(2i / D)) in channel 2i and the cosine of it in channel 2i + 1: [...] -> float32 [..., width]."""
    even = torch.arange(0, width, 2, device=position_ids.device).float()
    angles = position_ids.unsqueeze(-1) * 10000.0 ** (-even / width)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[..., :width]


class LearnedPositionEmbedding(nn.Module):
    """x plus the row of a trained table [P, D] that stands for the position (Radford et al. 2019, GPT-2).

    P is `max_position_embeddings`. Raises ValueError for a longer document.
    """

    def __init__(self, config: ModelConfig, seed: Seed) -> None:
        super().__init__()
        self.positions = config.max_position_embeddings
        self.weight = nn.Parameter(torch.empty(self.positions, config.hidden_size))
        seed.normal_(self.weight, "weight", config.initializer_range)

    def forward(self, x: Tensor, documents: Documents) -> Tensor:
        if documents.max_length > self.positions:
            raise ValueError(
                f"a document of {documents.max_length} tokens is longer than the {self.positions} learned positions "
                "(max_position_embeddings): cut it shorter, or train a model with more"
            )
        return x + F.embedding(documents.position_ids, self.weight)


POSITION_LAYERS = {"sinusoidal": SinusoidalPositionEmbedding, "learned": LearnedPositionEmbedding}
"""The layer that adds positions, by `ModelConfig.position_embedding`; rotary ones need none."""


def resize_positions(table: Tensor, positions: int) -> Tensor:
    """A learned table [P, D] for another number of positions, [positions, D]: its rows from the start, again and again.

    Copies keep what the model knows of nearby tokens, and training adapts them fast (Beltagy et al. 2020, Longformer,
    section 5); a document of at most P tokens is computed as before.
    """
    return table[torch.arange(positions) % len(table)]
