"""Added positions: their formulas, transformers' blocks without rotation on top of them, documents, decoding, refusals."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForCausalLM

from model.documents import Documents
from model.generation import generate
from model.hf.weights import save_hf, to_hf_state
from model.llama import Llama, layer_plan
from model.positions import resize_positions, sinusoids
from tests.model.tiny import positions, tiny
from training.optimizer import parameter_groups
from training.sections import OptimizerConfig

KINDS = ["sinusoidal", "learned"]
LENGTHS = [9, 1, 14, 6]


def ids_of(tokens: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(96, (rows, tokens), generator=torch.Generator().manual_seed(tokens))


@given(st.integers(1, 33), st.lists(st.integers(0, 5000), min_size=1, max_size=4))
def test_sinusoids_follow_their_formula(width, places):
    expected = np.empty((len(places), width))
    for row, place in enumerate(places):
        for channel in range(width):
            angle = place / 10000 ** (2 * (channel // 2) / width)
            expected[row, channel] = math.cos(angle) if channel % 2 else math.sin(angle)
    found = sinusoids(torch.tensor([places]), width)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found[0], expected, atol=1e-3)  # float32 holds an angle of 5000 to 2e-4


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers_without_rotation_on_the_sum(kind):
    """transformers rotates by nothing where all position ids are 0; it is given X + P instead of the tokens."""
    model = Llama(tiny(position_embedding=kind), seed=3).eval()
    rotary = tiny()
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**rotary.to_hf()), dtype=torch.float32).eval()
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("embed_positions")}
    theirs.load_state_dict(to_hf_state(state, rotary))
    ids, places = ids_of(29, rows=2), torch.arange(29)
    x = model.embed_tokens.weight[ids]
    if kind == "learned":
        summed = x + model.embed_positions.weight[places]
    else:
        summed = x * 64**0.5 + sinusoids(places, 64)
    with torch.no_grad():
        expected = theirs(inputs_embeds=summed, position_ids=torch.zeros(2, 29, dtype=torch.long)).logits
        torch.testing.assert_close(model(ids), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_equal_those_alone(kind):
    model = Llama(tiny(position_embedding=kind), seed=3).double()
    ids = ids_of(sum(LENGTHS))
    with torch.no_grad():
        packed = model(ids, positions(LENGTHS))
        alone = [model(part) for part in ids.split(LENGTHS, dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1))


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_keeps_its_dtype_and_the_accuracy_of_the_table(kind):
    config = tiny(position_embedding=kind, max_position_embeddings=3000)
    exact = Llama(config, seed=3)
    half = Llama(config, seed=3).bfloat16()
    documents = Documents.whole_rows(1, 3000)
    found, expected = (model.embed(ids_of(3000), documents) for model in (half, exact))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=0.05, rtol=0.01)


def test_only_learned_positions_have_weights_and_these_never_decay():
    sizes = {}
    for kind in ("rope", *KINDS):
        config = tiny(position_embedding=kind)
        model = Llama(config)
        sizes[kind] = sum(p.numel() for p in model.parameters())
        assert config.num_parameters() == sizes[kind]
    assert sizes["sinusoidal"] == sizes["rope"] == sizes["learned"] - 32 * 64
    (group,) = (g for g in parameter_groups(model, OptimizerConfig()) if g["name"] == "no_decay")
    assert any(parameter is model.embed_positions.weight for parameter in group["params"])
    layer = layer_plan(config)[1].build(seed=0)  # as a pipeline holds it, under another name
    assert [g["name"] for g in parameter_groups(torch.nn.ModuleDict({"layer": layer}), OptimizerConfig())] == [
        "no_decay"
    ]


def test_the_plan_has_the_weights_of_the_model():
    config = tiny(position_embedding="learned")
    model = Llama(config, seed=8)
    name, layer = layer_plan(config)[1].name, layer_plan(config)[1].build(seed=8)
    assert torch.equal(layer.weight, model.get_submodule(name).weight)
    assert layer.weight.std().item() == pytest.approx(config.initializer_range, rel=0.1)
    assert not torch.equal(layer.weight, Llama(config, seed=9).embed_positions.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_generation_equals_uncached(kind):
    model = Llama(tiny(position_embedding=kind), seed=5).double()
    prompt = ids_of(12)
    ids = prompt
    for _ in range(21):  # the last token, the 33rd, is not read
        with torch.no_grad():
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
    assert list(generate(model, prompt, 21, temperature=0)) == ids[0, 12:].tolist()


def test_there_are_no_learned_positions_beyond_the_table():
    model = Llama(tiny(position_embedding="learned"))
    with pytest.raises(ValueError, match="a document of 33 tokens is longer than the 32 learned positions"):
        model(ids_of(33))
    model(ids_of(64), positions([32, 32]))
    with pytest.raises(ValueError, match="generation of 22 tokens after a prompt of 12 goes beyond the model's 32"):
        generate(model, ids_of(12), 22)
    Llama(tiny(position_embedding="sinusoidal"))(ids_of(64))


@given(st.integers(1, 12), st.integers(1, 40))
def test_a_resized_table_repeats_the_rows_it_has(rows, longer):
    table = torch.arange(rows).unsqueeze(1).repeat(1, 3)
    assert resize_positions(table, longer)[:, 0].tolist() == [place % rows for place in range(longer)]


def test_documents_of_the_old_length_do_not_notice_more_positions():
    old, new = (Llama(tiny(position_embedding="learned", max_position_embeddings=n), seed=2) for n in (32, 80))
    state = old.state_dict()
    state["embed_positions.weight"] = resize_positions(state["embed_positions.weight"], 80)
    new.load_state_dict(state)
    ids = ids_of(32)
    with torch.no_grad():
        assert torch.equal(new(ids), old(ids))
        new(ids_of(80))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("key", "value"), [("rope_scaling", {"rope_type": "linear", "factor": 2.0}), ("rope_theta", 500000.0)]
)
def test_rotary_settings_without_rotary_positions_are_refused(kind, key, value):
    with pytest.raises(ValidationError, match=f"{key} has no meaning with position_embedding {kind}: remove it"):
        tiny(position_embedding=kind, **{key: value})


@pytest.mark.parametrize("kind", KINDS)
def test_an_odd_head_is_refused_for_rotation_only(kind):
    with pytest.raises(ValidationError, match="head_dim 15 is odd"):
        tiny(head_dim=15)
    assert Llama(tiny(position_embedding=kind, head_dim=15))(ids_of(4)).shape == (1, 4, 96)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_has_no_form_for_them(kind, tmp_path):
    model = Llama(tiny(position_embedding=kind))
    with pytest.raises(ValueError, match=f"transformers has no LLaMA with {kind} positions"):
        save_hf(model.config, model.state_dict().items(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
