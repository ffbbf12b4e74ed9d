"""A real checkpoint through our model; `make test-checkpoint` runs it."""

import pytest
import torch

from model.generation import generate
from model.hf.weights import from_hf_model, load_model, save_hf
from model.llama import Llama
from tests.smollm2 import load

pytestmark = pytest.mark.checkpoint_file
PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def checkpoint():
    """transformers' model and tokenizer, and ours with the same weights."""
    theirs, tokenizer = load()
    config, state = from_hf_model(theirs)
    ours = Llama(config)
    ours.load_state_dict(state)
    return theirs, tokenizer, ours


def test_logits_equal_transformers(checkpoint):
    theirs, tokenizer, ours = checkpoint
    text = "Once upon a time, in a village between two rivers, there lived an old clockmaker. " * 6
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    assert type(theirs).__name__ == "LlamaForCausalLM"
    assert ids.shape[1] > 100
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, atol=1e-4, rtol=0)


def test_it_knows_the_capital_of_france(checkpoint):
    theirs, tokenizer, ours = checkpoint
    ids = torch.tensor(tokenizer(PROMPT)["input_ids"])
    continuation = list(generate(ours, ids, 12, temperature=0))
    assert tokenizer.decode(continuation).startswith(" Paris")
    expected = theirs.generate(ids.unsqueeze(0), max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert continuation == expected[0, len(ids) :].tolist()


def test_it_becomes_a_folder_of_ours_bit_for_bit(checkpoint, tmp_path):
    _, _, ours = checkpoint
    save_hf(ours.config, ours.state_dict().items(), tmp_path, max_shard_bytes=10**8)
    back = load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), back.state_dict().values(), strict=True))
