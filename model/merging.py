"""Adapters made part of the matrices that they are for: W + sum of share_i * scaling_i * B_i A_i."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from .adapter_config import AdaptersConfig


def merged(
    base: Iterable[tuple[str, Tensor]],
    adapters: AdaptersConfig,
    state: Mapping[str, Tensor],
    shares: Mapping[str, float],
) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model without adapters that computes what `base` does with the adapters of `shares` added up.

    `state`: the adapters' parameters by their names in a `Llama`. Sums are made in float32, or float64 where the base is.
    """
    for name, tensor in base:
        module = name.removesuffix(".weight")
        for adapter, share in shares.items():
            if (a := state.get(f"{module}.lora_A_{adapter}")) is not None:
                wide = torch.promote_types(tensor.dtype, torch.float32)
                b = state[f"{module}.lora_B_{adapter}"]
                tensor = tensor.to(wide).addmm(b.to(wide), a.to(wide), alpha=share * adapters.scaling(adapter))
        yield name, tensor
