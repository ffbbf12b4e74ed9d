"""Unmasking with kept keys and values equals unmasking with the whole text read again in every step."""

import pytest
import torch

from model.llama import Llama
from model.unmasking import unmask
from tests.model.tiny import SCALINGS, tiny

MASK = 95
VARIANTS = {
    "full": {},
    "chunked": {"attention": "chunked", "chunk_size": 7},
    "single": {"attention": "chunked", "chunk_size": 1},
    "learned": {
        "attention": "chunked",
        "chunk_size": 7,
        "position_embedding": "learned",
        "max_position_embeddings": 64,
    },
} | {
    f"rope_{name}": {"attention": "chunked", "chunk_size": 7, "rope_scaling": SCALINGS[name]}
    for name in ("dynamic", "longrope", "yarn")
}


def model_of(variant) -> Llama:
    return Llama(tiny(is_causal=False, **VARIANTS[variant]), seed=5).double()


def prompt_of(tokens):
    return torch.randint(MASK, (tokens,), generator=torch.Generator().manual_seed(tokens))


def greedy_reading_everything(model, prompt, count, steps):
    """The definition: the whole text so far in every step, the surest predictions kept."""
    ids, end = prompt.tolist(), len(prompt) + count
    size = model.config.chunk_size or end
    pieces = []
    while len(ids) < end:
        last = min(len(ids) // size * size + size, end)
        text, open_ = ids + [MASK] * (last - len(ids)), list(range(len(ids), last))
        left = steps or len(open_)
        while open_:
            with torch.no_grad():
                logits = model(torch.tensor([text]))[0]
            logits[:, MASK] = -torch.inf
            best = logits.softmax(-1).max(-1)
            surest = sorted(open_, key=lambda i: -float(best.values[i]))[: -(-len(open_) // max(left, 1))]
            for i in surest:
                text[i] = int(best.indices[i])
            open_, left = [i for i in open_ if i not in surest], left - 1
        pieces.append(text[len(ids) :])
        ids = text
    return pieces


@pytest.mark.parametrize("tokens", [1, 3, 7, 20])
@pytest.mark.parametrize("steps", [None, 1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_kept_keys_and_values_change_nothing(variant, steps, tokens):
    model = model_of(variant)
    found = list(unmask(model, prompt_of(tokens), 24, MASK, steps, temperature=0))
    assert found == greedy_reading_everything(model, prompt_of(tokens), 24, steps)
    assert sum(map(len, found)) == 24
    assert not any(MASK in piece for piece in found)


def test_finished_chunks_are_read_once():
    model, read = model_of("chunked"), []
    model.embed_tokens.register_forward_hook(lambda _module, inputs, _output: read.append(inputs[0].shape[1]))
    list(unmask(model, prompt_of(70), 14, MASK, steps=2, temperature=0))
    assert read == [70, 7, 7, 7, 7, 7]  # the prompt, two steps, the finished chunk, two steps


def test_sampling_is_repeatable_and_differs_by_seed():
    def text(seed):
        generator = torch.Generator().manual_seed(seed)
        return list(unmask(model_of("chunked"), prompt_of(5), 20, MASK, 2, 1.0, 20, 0.9, generator))

    assert text(0) == text(0) != text(1)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"max_new_tokens": 0}, "at least one"),
        ({"steps": 0}, "at least one"),
        ({"temperature": -0.5}, "temperature >= 0"),
        ({"top_p": 0.0}, "0 < top_p <= 1"),
        ({"max_new_tokens": 62}, "goes beyond the model's 64 learned positions"),
    ],
)
def test_values_out_of_range_are_refused_before_anything_is_made(wrong, said):
    arguments = {"input_ids": prompt_of(3), "max_new_tokens": 61, "mask_id": MASK}
    assert sum(map(len, unmask(model_of("learned"), **arguments | {"steps": 1}))) == 61
    with pytest.raises(ValueError, match=said):
        unmask(model_of("learned"), **arguments | wrong)
