"""Where the layer plan is cut into pipeline stages."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.layout.pipeline import pipeline_bounds
from model.config import ModelConfig
from model.llama import Block, layer_plan

PARTITIONS = ["flops", "parameters", "uniform", "type:block", "type:block|head"]


def config(blocks: int, vocab_size: int = 256, tied: bool = False) -> ModelConfig:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    return ModelConfig(vocab_size=vocab_size, num_hidden_layers=blocks, tie_word_embeddings=tied, **sizes)


@given(
    blocks=st.integers(1, 24),
    stages=st.integers(1, 24),
    partition=st.sampled_from(PARTITIONS),
    vocab_size=st.sampled_from([16, 256, 50_000]),
    tied=st.booleans(),
)
def test_every_stage_has_a_block_and_every_layer_a_stage(blocks, stages, partition, vocab_size, tied):
    model = config(blocks, vocab_size, tied)
    if stages > blocks:
        with pytest.raises(ValueError, match=f"use at most {blocks} stages"):
            pipeline_bounds(model, stages, partition, 64)
        return
    bounds, plan = pipeline_bounds(model, stages, partition, 64), layer_plan(model)
    assert (bounds[0], bounds[-1], len(bounds)) == (0, len(plan), stages + 1)
    for begin, end in pairwise(bounds):
        assert any(entry.cls is Block for entry in plan[begin:end])


def test_the_head_counts_as_much_as_its_arithmetic():
    """A head worth some blocks leaves the last stage fewer of them; without its cost the cut is in the middle."""
    assert pipeline_bounds(config(8, vocab_size=16), 2, "flops", 64)[1] == 5
    model = config(8, vocab_size=1000)
    block = (model.flops_per_token(64) - 6 * 1000 * 32) / 8
    assert 2 < 6 * 1000 * 32 / block < 4
    assert pipeline_bounds(model, 2, "flops", 64)[1] == 6 or pipeline_bounds(model, 2, "flops", 64)[1] == 7
    assert pipeline_bounds(model, 2, "type:block", 64)[1] == 5


def test_two_copies_of_a_token_pass_through_the_blocks_and_one_through_the_head():
    half = pipeline_bounds(config(24, vocab_size=1500), 4, "flops", 64)
    assert pipeline_bounds(config(24, vocab_size=3000), 4, "flops", 64, copies=2) == half
    assert pipeline_bounds(config(24, vocab_size=3000), 4, "flops", 64) != half


def test_an_expression_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match="matches none of the layer classes Embedding, Block, RMSNorm, Head"):
        pipeline_bounds(config(2), 2, "type:decoder", 64)
