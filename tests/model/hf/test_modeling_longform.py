"""The code that travels with masked models: transformers computes what we do, and refuses what would be another function."""

import json
import runpy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
from transformers.utils import versions

from model.config import ModelConfig
from model.documents import Documents
from model.hf import modeling_longform
from model.hf.modeling_longform import visible
from model.hf.weights import load_model, save_hf
from model.llama import Llama
from model.visibility import Visibility
from tests.model.hf.test_parity import randomised
from tests.model.tiny import SCALINGS, positions, tiny

CHUNKS = {"attention": "chunked", "chunk_size": 6}
MODELS = {
    "full": {},
    "full_qk_norm": {"qk_norm": True},
    "chunks": CHUNKS,
    "single": CHUNKS | {"chunk_size": 1},
    "wide": CHUNKS | {"chunk_size": 40, "rope_theta": 500000.0},
    "chunks_qk_norm": CHUNKS | {"qk_norm": True, "attention_bias": True, "tie_word_embeddings": True},
    "chunks_yarn": CHUNKS | {"rope_scaling": SCALINGS["yarn"], "mlp_bias": True},
}
PACKED = positions([10, 19], [3, 26])


def written(folder, option) -> Llama:
    model = randomised(Llama(tiny(is_causal=False, **MODELS[option]), seed=1))
    save_hf(model.config, model.state_dict().items(), folder, objective={"name": "masked", "mask_ratio": 0.15})
    return model


def loaded(folder, **options):
    return AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, **options).eval()


def some_ids(rows=2, tokens=29):
    return torch.randint(96, (rows, tokens), generator=torch.Generator().manual_seed(tokens))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 10), st.integers(0, 5))
def test_it_is_the_visibility_of_training(lengths, chunk_size, padding):
    place = positions(lengths)
    tokens = Documents.from_position_ids(place).tokens()
    expected = Visibility(chunk_size).sees(tokens.at((slice(None), None)), tokens)
    assert torch.equal(visible(place, torch.ones_like(place), chunk_size)[0, 0], expected)
    expected[:, :padding] = False
    expected |= torch.eye(len(expected), dtype=torch.bool)
    mask = torch.arange(len(expected)).unsqueeze(0) >= padding
    assert torch.equal(visible(place, mask, chunk_size)[0, 0], expected)


@pytest.mark.parametrize("option", MODELS)
def test_logits_and_loss_are_ours(option, tmp_path):
    ours, ids = written(tmp_path, option), some_ids()
    for implementation in ("sdpa", "eager"):
        theirs = loaded(tmp_path, attn_implementation=implementation)
        with torch.no_grad():
            expected = ours(ids)
            torch.testing.assert_close(theirs(ids).logits, expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(theirs(inputs_embeds=theirs.model.embed_tokens(ids)).logits, expected)
            if "chunk_size" in MODELS[option]:  # transformers keeps documents apart under causal masks only
                found = theirs(ids, position_ids=PACKED).logits
                torch.testing.assert_close(found, ours(ids, PACKED), atol=1e-5, rtol=1e-5)
            labels = torch.where(ids % 3 == 0, ids, -100)
            loss = F.cross_entropy(expected.flatten(0, 1), labels.flatten())  # of the tokens themselves
            torch.testing.assert_close(theirs(ids, labels=labels).loss, loss, atol=1e-5, rtol=1e-5)
    half = loaded(tmp_path).bfloat16()
    assert (half(ids).logits.float() - expected).abs().mean() < 0.1 * expected.abs().mean()


@pytest.mark.parametrize("option", ["full", "chunks"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_on_either_side_changes_nothing(option, implementation, tmp_path):
    ours, theirs = written(tmp_path, option).double(), loaded(tmp_path, attn_implementation=implementation).double()
    short, ids = some_ids(1, 22), some_ids(1, 29)
    padding = torch.full((1, 7), 3)
    for parts, kept in (((padding, short), slice(7, None)), ((short, padding), slice(0, 22))):
        mask = torch.ones(2, 29, dtype=torch.long)
        mask[1] = 0
        mask[1, kept] = 1
        with torch.no_grad():
            found = theirs(torch.cat([ids, torch.cat(parts, 1)]), attention_mask=mask).logits
            torch.testing.assert_close(found[:1], ours(ids), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(found[1:, kept], ours(short), atol=1e-5, rtol=1e-5)
        assert found.isfinite().all()


@pytest.mark.parametrize("option", MODELS)
def test_the_folder_can_be_read_back_and_saved_again(option, tmp_path):
    ours, ids = written(tmp_path / "first", option), some_ids()
    assert ModelConfig.from_hf(tmp_path / "first") == ModelConfig.from_hf(ours.config.to_hf())
    loaded(tmp_path / "first").save_pretrained(tmp_path / "second")
    config = json.loads((tmp_path / "second/config.json").read_text())
    assert config["objective"] == {"name": "masked", "mask_ratio": 0.15}
    for folder in ("first", "second"):
        back = load_model(tmp_path / folder).eval()
        assert back.config.visibility == ours.config.visibility
        with torch.no_grad():
            assert torch.equal(back(ids), ours(ids))
            torch.testing.assert_close(loaded(tmp_path / folder)(ids).logits, ours(ids), atol=1e-5, rtol=1e-5)


def test_causal_chunks_are_a_plain_llama(tmp_path):
    config = tiny(**CHUNKS)
    ours = randomised(Llama(config, seed=1))
    save_hf(config, ours.state_dict().items(), tmp_path)
    assert not (tmp_path / "modeling_longform.py").exists()
    theirs, ids = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), some_ids()
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=1e-5, rtol=1e-5)


def test_what_would_be_another_function_is_refused(tmp_path):
    written(tmp_path / "chunks", "chunks")
    written(tmp_path / "full", "full")
    for loader in (AutoModelForMaskedLM, AutoModelForCausalLM):
        with pytest.raises(ValueError, match="trust_remote_code"):
            loader.from_pretrained(tmp_path / "chunks", trust_remote_code=False)
    for implementation in ("flash_attention_2", "flex_attention"):
        with pytest.raises(ValueError, match="does not support"):
            loaded(tmp_path / "chunks", attn_implementation=implementation)
    chunks, full, ids = loaded(tmp_path / "chunks"), loaded(tmp_path / "full"), some_ids()
    with pytest.raises(ValueError, match="past_key_values cannot be used"):
        chunks(ids, past_key_values=chunks(ids, use_cache=True).past_key_values)
    with pytest.raises(ValueError, match="attention_mask must be of shape"):
        chunks(ids, attention_mask=torch.ones(2, 1, 29, 29))
    for model in (chunks, full):
        with pytest.raises(ValueError, match="predicts masked tokens"):
            model.generate(ids)
    config = json.loads((tmp_path / "chunks/config.json").read_text())
    with pytest.raises(ValueError, match="model_type 'chunked_llama' is not supported"):
        ModelConfig.from_hf({key: value for key, value in config.items() if key != "chunk_size"})


def test_transformers_that_would_make_it_causal_are_refused(monkeypatch):
    monkeypatch.setattr(versions.importlib.metadata, "version", lambda _name: "5.1.0")
    with pytest.raises(ImportError, match=r"transformers>=5\.2"):
        runpy.run_path(modeling_longform.__file__)
