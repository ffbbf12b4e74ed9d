"""ZeRO-0's own gradient norm, on a vector long enough for float32 sums to go wrong."""

import pytest
import torch

from engine.optimizer import GuardedAdamW


def test_the_norm_of_millions_of_elements_is_exact():
    weight = torch.nn.Parameter(torch.zeros(4_000_000))
    weight.grad = torch.randn(4_000_000, generator=torch.Generator().manual_seed(0))
    expected = weight.grad.double().norm().item()
    optimizer = GuardedAdamW([{"params": [weight], "weight_decay": 0.0}], 1.0, lr=0.1)
    optimizer.step()
    assert float(optimizer._global_grad_norm) == pytest.approx(expected, rel=1e-6)
    assert weight.grad.double().norm().item() == pytest.approx(1, rel=1e-5)
