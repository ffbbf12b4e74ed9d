"""How far a tensor is from the same one in float64."""

from collections.abc import Iterable

import torch
from torch import Tensor


def difference(found: Tensor, expected: Tensor) -> float:
    """||found - expected|| / ||expected||, nan if anything is."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).norm() / expected.norm())


def differences(found: Iterable[Tensor], expected: Iterable[Tensor]) -> list[float]:
    return [difference(one, other) for one, other in zip(found, expected, strict=True)]


def doubled(*tensors: Tensor) -> list[Tensor]:
    """The same values in float64, to be differentiated by themselves."""
    return [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


def peak_bytes(function) -> int:
    """Most memory of the card that a call takes beyond what is held before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before
