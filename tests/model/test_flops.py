"""The arithmetic of a training step that the formula predicts is what torch counts."""

from itertools import product

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.adapter_config import AdaptersConfig
from model.config import ModelConfig
from model.llama import Llama

TOKENS, ROWS = 16, 4


ADAPTED = product(["single", "routed", "mixture", "hard"], [None, 2], [False, True])


@pytest.mark.parametrize(("mode", "last_layers", "train_base"), [(None, None, False), *ADAPTED])
def test_of_a_step(mode, last_layers, train_base):
    names = () if mode is None else ("a",) if mode == "single" else ("a", "b", "c")
    more = {"mode": mode, "r": 32, "last_layers": last_layers, "train_base": train_base} if names else {}
    config = ModelConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        adapters=AdaptersConfig(names=names, **more),
    )
    model = Llama(config, seed=1)
    ids = torch.randint(512, (ROWS, TOKENS), generator=torch.Generator().manual_seed(2))
    routing = {"single": torch.zeros(ROWS, dtype=torch.int64), "routed": torch.tensor([0, 1, 2, 1])}
    adapters = routing.get(mode)
    with FlopCounterMode(display=False) as counted:
        if mode == "hard":
            with torch.no_grad():
                model(ids, targets=ids)
            adapters = torch.tensor([0, 1, 2, 1])
        model(ids, targets=ids, adapters=adapters)[0].backward()
    # attention of so short documents is some thousandths, and computed whole, not half
    assert counted.get_total_flops() / (ROWS * TOKENS) == pytest.approx(config.flops_per_token(TOKENS), rel=0.02)
