"""Folders of weights: bit-exact round trips, sharding, bounded memory, and refusals that name the file."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from model.hf.weights import from_hf_state, load_hf, load_model, save_hf, to_hf_state
from model.llama import Llama
from tests.model.tiny import tiny


def saved(folder, config=None, dtype=torch.float32, **options):
    model = Llama(config or tiny(), seed=1).to(dtype)
    save_hf(model.config, model.state_dict().items(), folder, dtype=dtype, **options)
    return model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [1, 40_000, 10**9])
def test_round_trip_is_bit_exact(tmp_path, tied, dtype, max_shard_bytes):
    model = saved(tmp_path, tiny(tie_word_embeddings=tied), dtype, max_shard_bytes=max_shard_bytes)
    back = load_model(tmp_path, dtype)
    assert back.config.to_hf() == model.config.to_hf()
    assert (back.lm_head.weight is back.embed_tokens.weight) is tied
    assert back.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), back.state_dict().values(), strict=True))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == dtype
    theirs.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again", dtype)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


@given(tied=st.booleans(), bias=st.booleans())
def test_names_convert_both_ways(tied, bias):
    config = tiny(tie_word_embeddings=tied, attention_bias=bias, num_hidden_layers=1)
    with torch.device("meta"):
        state = Llama(config).state_dict()
    hf = to_hf_state(state, config)
    assert ("lm_head.weight" in hf) is not tied
    assert all(name.startswith("model.") for name in hf if name != "lm_head.weight")
    assert from_hf_state(hf | {"model.layers.0.self_attn.rotary_emb.inv_freq": None}, config).keys() == state.keys()


def test_shards_are_bounded_indexed_and_written_as_the_tensors_come(tmp_path):
    config, limit = tiny(num_hidden_layers=4), 60_000
    alive = []

    def stream():
        for name, tensor in Llama(config).state_dict().items():
            written = sum(f.stat().st_size for f in tmp_path.glob("*.part"))
            alive.append(sum(t for t in sizes) - written)
            sizes.append(tensor.nbytes)
            yield name, tensor

    sizes: list[int] = []
    save_hf(config, stream(), tmp_path, max_shard_bytes=limit)
    assert max(alive) <= limit + max(sizes)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [s.name for s in shards]
    assert shards[-1].name == f"model-{len(shards):05d}-of-{len(shards):05d}.safetensors"
    for shard in shards:
        tensors = load_file(shard)
        assert sum(t.nbytes for t in tensors.values()) <= limit
        assert {index["weight_map"][name] for name in tensors} == {shard.name}


def test_token_ids_reach_both_configs(tmp_path):
    saved(tmp_path, token_ids={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id, theirs.config.pad_token_id) == (1, 2, None)
    assert (theirs.generation_config.bos_token_id, theirs.generation_config.eos_token_id) == (1, 2)


def test_weights_are_read_one_at_a_time(tmp_path):
    model = saved(tmp_path, max_shard_bytes=40_000)
    config, tensors = load_hf(tmp_path)
    assert config.to_hf() == model.config.to_hf()
    first = next(tensors)
    for shard in tmp_path.glob("*.safetensors"):
        shard.rename(shard.with_suffix(".gone"))
    assert torch.equal(first[1], model.state_dict()[first[0]])
    with pytest.raises(FileNotFoundError):
        list(tensors)


@pytest.mark.parametrize(
    ("mutate", "complaint"),
    [
        (lambda s: s.pop("model.norm.weight"), "1 weights are missing, first model.norm.weight"),
        (lambda s: s.update({"model.extra": torch.zeros(1)}), "model.extra is not a weight"),
        (lambda s: s.update({"model.norm.weight": torch.zeros(3)}), r"model.norm.weight has shape \(3,\)"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(tmp_path, mutate, complaint):
    saved(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    mutate(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=complaint):
        load_hf(tmp_path)


def test_damaged_and_absent_files_are_refused(tmp_path):
    saved(tmp_path)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: damaged or incomplete"):
        load_hf(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match=r"neither model\.safetensors"):
        load_hf(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "a.safetensors"}})
    )
    with pytest.raises(ValueError, match="named in model"):
        load_hf(tmp_path)


def test_an_interrupted_or_wrong_export_leaves_no_model(tmp_path):
    config = tiny()
    state = Llama(config).state_dict()

    def interrupted():
        yield from list(state.items())[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_hf(config, interrupted(), tmp_path, max_shard_bytes=1)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="weights of the model are missing"):
        save_hf(config, list(state.items())[:-1], tmp_path)
    with pytest.raises(ValueError, match="came twice"):
        save_hf(config, [*state.items(), ("norm.weight", state["norm.weight"])], tmp_path)
    assert not list(tmp_path.iterdir())
    save_hf(config, state.items(), tmp_path)
    with pytest.raises(ValueError, match="exists already"):
        save_hf(config, state.items(), tmp_path)
