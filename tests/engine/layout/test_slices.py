"""Which parameters tensor parallelism cuts, and that cutting and joining undo each other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from engine.layout.slices import cut_dimensions, join, slice_of
from model.config import ModelConfig
from model.llama import Llama

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
}


@pytest.fixture(params=[False, True], ids=["plain", "all options"])
def model(request) -> Llama:
    options = dict.fromkeys(("attention_bias", "mlp_bias", "qk_norm", "tie_word_embeddings"), request.param)
    with torch.device("meta"):
        return Llama(ModelConfig(**SIZES, **options))


def test_every_parameter_has_its_place(model):
    assert cut_dimensions(model.config).keys() == model.state_dict().keys()


def test_every_matrix_is_cut_so_that_a_rank_needs_no_other_inside_attention_and_feed_forward(model):
    dimensions = cut_dimensions(model.config)
    inner = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            *_, part, name = path.split(".")
            leads_back = name == inner[part][-1]
            assert dimensions[f"{path}.weight"] == int(leads_back)
            if module.bias is not None:
                assert dimensions[f"{path}.bias"] == (None if leads_back else 0)
    assert dimensions["embed_tokens.weight"] == dimensions["lm_head.weight"] == 0
    assert all(dimension is None for name, dimension in dimensions.items() if "norm" in name)


@given(
    rows=st.integers(1, 9), columns=st.integers(1, 9), ranks=st.integers(1, 5), dimension=st.sampled_from([0, 1, None])
)
def test_joining_undoes_cutting(rows, columns, ranks, dimension):
    whole = torch.arange(rows * columns).view(rows, columns)
    parts = [slice_of(whole, dimension, rank, ranks) for rank in range(ranks)]
    torch.testing.assert_close(join(parts, dimension), whole, rtol=0, atol=0)
    if dimension is not None:
        lengths = [part.shape[dimension] for part in parts]
        assert max(lengths) - min(lengths) <= 1
