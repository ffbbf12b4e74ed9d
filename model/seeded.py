"""Initial values that depend on nothing but the run's seed and a parameter's place in the model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .documents import Documents


@dataclass(frozen=True)
class Seed:
    """Where initial values come from: the run's seed, the index of the layer in the plan, and the parameter's name."""

    run: int
    layer: int

    @torch.no_grad()
    def normal_(self, parameter: Tensor, name: str, std: float) -> None:
        """Fill with N(0, std^2), drawn in float32 on the CPU whatever the parameter's dtype, device or the defaults."""
        if not parameter.is_meta:
            # torch.normal is not among the constructors that zero.Init replaces
            parameter.copy_(torch.normal(0.0, std, tuple(parameter.shape), **self._drawn(name)))

    @torch.no_grad()
    def uniform_(self, parameter: Tensor, name: str, bound: float) -> None:
        """Fill with numbers between -bound and bound, drawn likewise."""
        if not parameter.is_meta:
            parameter.copy_((torch.rand(tuple(parameter.shape), **self._drawn(name)) * 2 - 1) * bound)

    def _drawn(self, name: str) -> dict[str, Any]:
        digest = hashlib.blake2b(f"{self.run}/{self.layer}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
        return {"generator": generator, "dtype": torch.float32, "device": "cpu"}


def multiply(x: Tensor, documents: Documents | None, *maps: nn.Module) -> tuple[Tensor, ...]:
    """What linear maps make of the same activations [B, T, D]; tensor parallelism puts an exchange between ranks before it."""
    return tuple(each(x, documents) for each in maps)


class Linear(nn.Linear):
    """`nn.Linear` whose weight is drawn here, in the constructor: later passes would find it partitioned by ZeRO-3."""

    def __init__(self, inputs: int, outputs: int, bias: bool, std: float, seed: Seed, name: str) -> None:
        super().__init__(inputs, outputs, bias=bias)
        seed.normal_(self.weight, name, std)
        if bias:
            nn.init.zeros_(self.bias)

    def reset_parameters(self) -> None:
        """Left to the constructor, which knows the seed."""

    def forward(self, x: Tensor, documents: Documents | None = None) -> Tensor:
        return F.linear(x, self.weight, self.bias)
