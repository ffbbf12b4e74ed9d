"""Rotary tables equal transformers'; a document's table does not depend on its neighbours."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from model.documents import Documents
from model.rope import inverse_frequencies, rope_depends_on_length, rotary_tables, rotate
from tests.model.tiny import SCALINGS, positions, tiny


@pytest.mark.parametrize("tokens", [5, 16, 17, 32, 33, 200])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_rotation_equals_transformers(scaling, tokens):
    config = tiny(rope_scaling=SCALINGS[scaling], rope_theta=50000.0)
    theirs = LlamaRotaryEmbedding(AutoConfig.for_model(**config.to_hf()))
    q = torch.randn(2, tokens, 4, 16, generator=torch.Generator().manual_seed(tokens))
    cos, sin = theirs(q, torch.arange(tokens).unsqueeze(0))
    expected, _ = apply_rotary_pos_emb(q, q, cos, sin, unsqueeze_dim=2)
    tables = rotary_tables(config, Documents.whole_rows(2, tokens))
    torch.testing.assert_close(rotate(q, *tables), expected, atol=2e-5, rtol=1e-5)


@st.composite
def scalings(draw, width: int) -> dict:
    """Every kind with every optional key, given or not, in the ranges of published models."""
    kind = draw(st.sampled_from(["linear", "dynamic", "yarn", "llama3", "longrope"]))
    factor, optional = draw(st.floats(1.0, 64.0)), {}
    if kind in ("yarn", "longrope"):
        optional |= {"attention_factor": st.floats(0.5, 2.0)}
    if kind == "yarn":
        optional |= {"beta_fast": st.floats(8.0, 64.0), "beta_slow": st.floats(0.5, 4.0), "truncate": st.booleans()}
        optional |= {"mscale": st.floats(0.1, 2.0), "mscale_all_dim": st.floats(0.1, 2.0)}
    if kind in ("yarn", "llama3", "longrope"):
        optional |= {"original_max_position_embeddings": st.sampled_from([64, 512, 8192])}
    scaling = draw(st.fixed_dictionaries({}, optional=optional))
    if kind == "llama3":
        scaling |= {"low_freq_factor": draw(st.floats(0.5, 2.0)), "high_freq_factor": draw(st.floats(3.0, 8.0))}
    if kind == "longrope":
        factors = st.lists(st.floats(1.0, 100.0), min_size=width // 2, max_size=width // 2)
        scaling |= {"short_factor": draw(factors), "long_factor": draw(factors)}
    if kind != "longrope" or draw(st.booleans()):
        scaling["factor"] = factor
    return {"rope_type": kind, **scaling}


@given(st.data(), st.sampled_from([16, 64, 128]), st.sampled_from([1e4, 5e5]), st.sampled_from([1, 600, 5000, 200_000]))
def test_frequencies_equal_transformers_for_any_scaling_and_length(data, width, theta, length):
    scaling = data.draw(scalings(width))
    config = tiny(head_dim=width, rope_theta=theta, rope_scaling=scaling, max_position_embeddings=4096)
    theirs = AutoConfig.for_model(**config.to_hf())
    expected, expected_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, torch.device("cpu"), seq_len=length)
    found, factor = inverse_frequencies(config, length)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert factor == pytest.approx(expected_factor)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_packed_tables_equal_those_of_each_document(scaling):
    config = tiny(rope_scaling=SCALINGS[scaling])
    lengths = [40, 3, 20, 33]
    packed = rotary_tables(config, Documents.from_position_ids(positions(lengths)))
    alone = [rotary_tables(config, Documents.whole_rows(1, n)) for n in lengths]
    for table, pieces in zip(packed, zip(*alone, strict=True), strict=True):
        assert torch.equal(table, torch.cat(pieces, dim=1))


def test_tables_are_float32_and_shared_whatever_the_default_dtype():
    documents = Documents.whole_rows(1, 30)
    exact = rotary_tables(tiny(), documents)
    assert rotary_tables(tiny(), documents)[0] is exact[0]
    torch.set_default_dtype(torch.bfloat16)
    try:
        again = rotary_tables(tiny(), Documents.whole_rows(1, 30))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(exact, again, strict=True))


def test_rotation_has_the_gradient_of_its_formula():
    tables = [t.double() for t in rotary_tables(tiny(), Documents.whole_rows(2, 6))]
    x = torch.randn(2, 6, 3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotate(x, *tables), x)
    assert torch.autograd.gradcheck(lambda x: rotate(x.transpose(1, 2).contiguous().transpose(1, 2), *tables), x)


def test_only_dynamic_and_longrope_depend_on_length():
    found = {name for name, scaling in SCALINGS.items() if rope_depends_on_length(tiny(rope_scaling=scaling))}
    assert found == {"dynamic", "longrope"}
