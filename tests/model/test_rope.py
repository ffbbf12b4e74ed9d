"""Rotary tables equal transformers'; a document's table does not depend on its neighbours."""

import pytest
import torch
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from model.documents import Documents
from model.rope import rope_depends_on_length, rotary_tables, rotate
from tests.model.support import SCALINGS, positions, tiny


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
