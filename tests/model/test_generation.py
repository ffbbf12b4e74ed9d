"""Decoding with a cache equals decoding without one; greedy equals transformers; sampling follows its definition."""

from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from model.generation import continuation_losses, generate, sample
from model.hf.weights import to_hf_state
from model.llama import Llama
from tests.model.test_adapters import made
from tests.model.tiny import SCALINGS, TensorSizes, tiny

VARIANTS = {
    "gqa": {},
    "mqa_tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "window": {"sliding_window": 6},
    "qk_norm_window": {"qk_norm": True, "sliding_window": 6},
} | {f"rope_{name}": {"rope_scaling": scaling} for name, scaling in SCALINGS.items() if scaling}


def prompt_of(tokens):
    return torch.randint(96, (tokens,), generator=torch.Generator().manual_seed(tokens))


def without_cache(model, prompt, count, choose=torch.argmax):
    ids = prompt.clone()
    for _ in range(count):
        with torch.no_grad():
            token = choose(model(ids.unsqueeze(0))[0, -1])
        ids = torch.cat([ids, torch.as_tensor(token).view(1)])
    return ids[len(prompt) :].tolist()


@pytest.mark.parametrize("tokens", [1, 5, 12])
@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_equals_uncached(variant, tokens):
    # 30 tokens cross both the original context (16) and max_position_embeddings (32)
    model = Llama(tiny(**VARIANTS[variant]), seed=5).double()
    prompt = prompt_of(tokens)
    assert list(generate(model, prompt, 30, temperature=0)) == without_cache(model, prompt, 30)


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_of_continuations_equal_those_without_cache(variant):
    model = Llama(tiny(**VARIANTS[variant]), seed=5).double()
    prompt, continuations = prompt_of(14), [[3, 9, 27], [3, 8], [95], list(range(7)), [3, 9, 27]]
    found = continuation_losses(model, prompt, continuations)
    assert found[0] == pytest.approx(found[-1], rel=1e-12)
    for loss, continuation in zip(found, continuations, strict=True):
        expected = 0.0
        for place, token in enumerate(continuation):
            ids = torch.cat([prompt, torch.tensor(continuation[:place], dtype=torch.int64)])
            with torch.no_grad():
                expected -= float(model(ids.unsqueeze(0))[0, -1].log_softmax(-1)[token])
        assert loss == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("seed", [0, 1])
def test_sampled_tokens_equal_those_without_cache(seed):
    model = Llama(tiny(), seed=5).double()
    choices = torch.Generator().manual_seed(seed)
    expected = without_cache(model, prompt_of(7), 20, lambda logits: sample(logits, 0.8, 20, 0.9, choices))
    found = generate(model, prompt_of(7), 20, 0.8, 20, 0.9, generator=torch.Generator().manual_seed(seed))
    assert list(found) == expected
    assert len(set(expected)) > 3


@pytest.mark.parametrize(
    "variant", ["gqa", "mqa_tied", "window", "qk_norm_window", "rope_linear", "rope_yarn", "rope_llama3"]
)
def test_greedy_equals_transformers(variant):
    config = tiny(**VARIANTS[variant])
    model = Llama(config, seed=6)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.to_hf()), dtype=torch.float32)
    theirs.load_state_dict(to_hf_state(model.state_dict(), config), strict=not config.tie_word_embeddings)
    theirs.tie_weights()
    prompt = prompt_of(9)
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = theirs.eval().generate(prompt.unsqueeze(0), **options)[0, 9:].tolist()
    assert list(generate(model, prompt, 20, temperature=0)) == expected


def test_stops_at_an_end_token_and_at_the_limit():
    model = Llama(tiny(), seed=5)
    whole = list(generate(model, prompt_of(5), 12, temperature=0))
    end = next(token for token in whole if whole.index(token) > 2)
    assert list(generate(model, prompt_of(5), 12, temperature=0, eos_id=end)) == whole[: whole.index(end) + 1]
    assert list(generate(model, prompt_of(5), 12, temperature=0, eos_id=[end, 95])) == whole[: whole.index(end) + 1]
    assert list(generate(model, prompt_of(5), 0)) == []
    assert list(islice(generate(model, prompt_of(5).unsqueeze(0), 10**6 // 96, temperature=0), 4)) == whole[:4]


@given(
    weights=st.lists(st.integers(1, 50), min_size=2, max_size=12, unique=True),
    top_k=st.one_of(st.none(), st.integers(1, 14)),
    top_p=st.one_of(st.none(), st.floats(0.01, 1.0)),
)
def test_sampling_keeps_the_tokens_of_the_definition(weights, top_k, top_p):
    probabilities = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    ranked = sorted(range(len(weights)), key=lambda i: -weights[i])[: top_k or len(weights)]
    kept, mass, total = set(), 0.0, sum(weights[i] for i in ranked)
    for token in ranked:
        if top_p is not None and mass >= top_p + 1e-6:
            break
        kept.add(token)
        mass += weights[token] / total
    generator = torch.Generator().manual_seed(0)
    drawn = {sample(probabilities.log(), 1.0, top_k, top_p, generator) for _ in range(60)}
    assert drawn <= kept
    assert sample(probabilities.log(), 0.0) == ranked[0]


def test_sampling_follows_the_temperature():
    logits = torch.tensor([1.0, 0.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(torch.tensor([sample(logits, 0.5, generator=generator) for _ in range(4000)]), minlength=3)
    torch.testing.assert_close(counts / 4000, (logits / 0.5).softmax(0), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"input_ids": torch.zeros(2, 3).long()},
     {"input_ids": torch.zeros(0).long()}],
)  # fmt: skip
def test_values_out_of_range_are_refused(wrong):
    arguments = {"input_ids": prompt_of(3), "max_new_tokens": 2} | wrong
    with pytest.raises(ValueError, match="generation"):
        generate(Llama(tiny()), **arguments)


def test_the_prompt_costs_memory_linear_in_its_length():
    model = Llama(tiny(num_hidden_layers=1))
    with TensorSizes() as sizes:
        next(generate(model, torch.zeros(4096, dtype=torch.long), 1))
    assert sizes.largest <= 4096 * 112


@pytest.mark.parametrize("evidence", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("last_layers", [None, 1])
def test_a_mixture_writes_with_the_probabilities_that_it_is_trained_by(evidence, last_layers):
    """Its weights carry over from the prompt into the text, and back when the text is another."""
    model = made({"names": ("a", "b", "c"), "mode": "mixture", "evidence": evidence, "last_layers": last_layers})
    prompt, *continuations = (
        torch.randint(101, (n,), generator=torch.Generator().manual_seed(n)) for n in (7, 1, 4, 9)
    )

    def loss(ids: torch.Tensor) -> float:
        return float(model(ids[None, :-1], targets=ids[None, 1:])[0])

    found = continuation_losses(model, prompt, [continuation.tolist() for continuation in continuations])
    for mine, continuation in zip(found, continuations, strict=True):
        assert mine == pytest.approx(loss(torch.cat([prompt, continuation])) - loss(prompt), rel=1e-8)
    greedy = torch.tensor(list(generate(model, prompt, 2, temperature=0)))
    for place, token in enumerate(greedy.tolist()):
        before = torch.cat([prompt, greedy[:place]])
        others = [loss(torch.cat([before, torch.tensor([other])])) for other in range(101)]
        assert others[token] == min(others)


DRAWS, REJECTED = 500, 1e-4
"""Texts that are drawn, and the p-value of a chi-square test below which they are another distribution's."""


def p_values(counts: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Of Pearson's test for counts [..., outcomes]."""
    expected = probabilities * counts.sum(-1, keepdim=True)
    statistic = ((counts - expected).square() / expected).sum(-1)
    return torch.special.gammaincc(torch.tensor((counts.shape[-1] - 1) / 2).double(), statistic / 2)


@pytest.mark.parametrize("evidence", [0.0, 1.0])
def test_drawing_one_member_is_drawing_from_the_mixture(evidence):
    """Texts of two tokens after a prompt, against the exact mixture. The test would notice, 99 times of 100, texts
    of one member, or of members that are drawn as the other evidence has it."""
    adapters = {"names": ("a", "b"), "mode": "mixture", "evidence": evidence, "prior": {"a": 1, "b": 2}}
    model, prompt = (
        made(adapters, {"vocab_size": 3, "num_hidden_layers": 2, "initializer_range": 0.3}),
        torch.tensor([0, 2, 2, 1, 0]),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter *= 20 if "lora_B" in name else 1
    texts = torch.cartesian_prod(torch.arange(3), torch.arange(3))

    def exact(other: dict) -> torch.Tensor:
        """Of the texts [9], by the mixture with these fields."""
        same = Llama(model.config.model_copy(update={"adapters": model.config.adapters.model_copy(update=other)}))
        same.double().load_state_dict(model.state_dict())
        return torch.tensor(continuation_losses(same, prompt, texts.tolist())).double().neg().exp()

    expected = exact({})
    assert expected.sum() == pytest.approx(1)
    generator, counts = torch.Generator().manual_seed(1), torch.zeros(9).double()
    for _ in range(DRAWS):
        first, second = generate(model, prompt, 2, generator=generator, one_member=True)
        counts[3 * first + second] += 1
    assert p_values(counts, expected) > REJECTED

    wrong = [
        exact({"evidence": 1 - evidence}),
        exact({"prior": {"a": 1, "b": 1e-9}}),
        exact({"prior": {"a": 1e-9, "b": 1}}),
    ]
    for other in wrong:
        drawn = torch.multinomial(other, 500 * DRAWS, replacement=True, generator=generator).view(500, DRAWS)
        found = torch.nn.functional.one_hot(drawn, 9).sum(1).double()
        assert (p_values(found, expected) < REJECTED).double().mean() > 0.99, other


def test_one_member_needs_a_mixture_that_keeps_all_or_nothing():
    for model in (Llama(tiny()), made({"names": ("a", "b"), "mode": "mixture", "evidence": 0.5})):
        with pytest.raises(
            ValueError, match="one member can be drawn from a mixture of adapters whose evidence is 0 or 1"
        ):
            generate(model, prompt_of(3), 2, one_member=True)
