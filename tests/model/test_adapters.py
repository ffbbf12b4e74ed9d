"""Adapters compute what PEFT's LoRA does, each row its own, and start as the base."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from transformers import LlamaConfig, LlamaForCausalLM

from model.adapter_config import PROJECTIONS, AdaptersConfig, adapter_of
from model.config import ModelConfig
from model.hf.weights import to_hf_state
from model.llama import Llama
from tests.properties import examples

SHAPE = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.05,
}


def made(adapters: dict, shape: dict | None = None) -> Llama:
    """In float64, with second factors that are not zero."""
    model = Llama(ModelConfig(**SHAPE | (shape or {}), adapters=AdaptersConfig(**adapters)), seed=5).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator).double() * 0.1)
    return model


def ids(rows: int, tokens: int = 9) -> torch.Tensor:
    return torch.randint(SHAPE["vocab_size"], (rows, tokens), generator=torch.Generator().manual_seed(rows))


def loss_of(model: Llama, input_ids: torch.Tensor, adapters: torch.Tensor | None) -> torch.Tensor:
    targets = torch.roll(input_ids, -1, 1)
    targets[:, -1] = -100
    return model(input_ids, targets=targets, adapters=adapters)[0]


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    ("targets", "last_layers", "shape"),
    [
        (PROJECTIONS, None, {}),
        (("q_proj", "v_proj"), None, {"tie_word_embeddings": True}),
        (("o_proj", "up_proj", "down_proj"), 2, {"attention_bias": True, "mlp_bias": True}),
    ],
)
def test_one_adapter_is_pefts_lora(use_rslora, targets, last_layers, shape):
    adapters = {"names": ("only",), "mode": "single", "r": 4, "lora_alpha": 12, "use_rslora": use_rslora}
    model = made(adapters | {"target_modules": targets, "last_layers": last_layers}, shape)
    config = LlamaConfig(**{key: value for key, value in model.config.to_hf().items() if key != "architectures"})
    config._attn_implementation = "eager"
    plain = LlamaForCausalLM(config).double()
    base = {name: tensor for name, tensor in model.state_dict().items() if adapter_of(name) is None}
    plain.load_state_dict(to_hf_state(base, model.config), strict=not shape.get("tie_word_embeddings"))
    layers = list(model.config.adapters.adapted_layers(model.config.num_hidden_layers))
    lora = LoraConfig(
        r=4, lora_alpha=12, use_rslora=use_rslora, target_modules=list(targets), layers_to_transform=layers
    )
    theirs = get_peft_model(plain, lora, adapter_name="only").double()
    named = dict(theirs.named_parameters())

    def twin(name: str) -> torch.Tensor:
        module, _, leaf = name.rpartition(".")
        return named[f"base_model.model.model.{module}.{leaf[:6]}.only.weight"]

    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(own) == sum(parameter.requires_grad for parameter in theirs.parameters())
    with torch.no_grad():
        for name, parameter in own.items():
            twin(name).copy_(parameter)
    rows = ids(3)
    found = model(rows, adapters=torch.zeros(3, dtype=torch.long))
    torch.testing.assert_close(found, theirs(rows).logits, rtol=1e-6, atol=1e-6)
    (loss_of(model, rows, torch.zeros(3, dtype=torch.long)) / (rows.numel() - len(rows))).backward()
    theirs(rows, labels=rows).loss.backward()
    for name, parameter in own.items():
        torch.testing.assert_close(parameter.grad, twin(name).grad, rtol=1e-6, atol=1e-6)


RANKS = st.lists(st.integers(1, 6), min_size=1, max_size=4)


@examples(20)
@given(RANKS, st.data())
def test_each_row_has_its_own_adapter(ranks, data):
    """And no adapter gets a gradient of another's rows."""
    names = tuple(f"a{i}" for i in range(len(ranks)))
    model = made({"names": names, "r": dict(zip(names, ranks, strict=True)), "target_modules": PROJECTIONS[::2]})
    routing = torch.tensor(data.draw(st.lists(st.integers(0, len(ranks) - 1), min_size=1, max_size=5)))
    rows = ids(len(routing))
    found = model(rows, adapters=routing)
    for row, adapter in enumerate(routing.tolist()):
        alone = made({"names": (names[adapter],), "r": ranks[adapter], "target_modules": PROJECTIONS[::2]})
        state = model.state_dict()
        alone.load_state_dict({name: state[name] for name in alone.state_dict()})
        expected = alone(rows[row : row + 1], adapters=torch.zeros(1, dtype=torch.long))
        torch.testing.assert_close(found[row : row + 1], expected)
    loss_of(model, rows, routing).backward()
    for name, parameter in model.named_parameters():
        if (adapter := adapter_of(name)) is None:
            assert parameter.grad is None
        else:
            assert bool(parameter.grad.any()) == (names.index(adapter) in routing.tolist())


@pytest.mark.parametrize("last_layers", [None, 1])
@pytest.mark.parametrize("evidence", [0.0, 0.7, 1.0])
def test_a_mixture_is_of_the_likelihoods_that_each_adapter_gives(evidence, last_layers):
    """Packed documents, targets that do not count, in value and gradient by the definition, each adapter run by itself."""
    names = ("a", "b", "c")
    mixed = {"mode": "mixture", "evidence": evidence, "prior": {"a": 1, "b": 2, "c": 5}, "last_layers": last_layers}
    model = made({"names": names, "r": 3, **mixed})
    input_ids, lengths = ids(2, 12), [5, 7, 12]
    position_ids = torch.cat([torch.arange(n) for n in lengths]).view(2, 12)
    targets = torch.roll(input_ids, -1, 1)
    targets[0, 4] = targets[0, 8] = targets[:, -1] = -100
    objective, sums = model(input_ids, position_ids, targets)

    counted, index = targets >= 0, targets.clamp(min=0).unsqueeze(-1)
    logits = torch.stack([model(input_ids, position_ids, adapters=torch.full((2,), i)) for i in range(3)])
    likelihoods = logits.log_softmax(-1).gather(-1, index.expand(3, *index.shape)).squeeze(-1) * counted
    prior = torch.tensor([1, 2, 5]).double() / 8
    expected, responsibilities = torch.zeros(()).double(), torch.zeros(3).double()
    for row, token in counted.nonzero().tolist():
        first = token - int(position_ids[row, token])
        weights = prior.log()
        for before in range(first, token):
            weights = (evidence * (weights + likelihoods[:, row, before]) + (1 - evidence) * prior.log()).log_softmax(0)
        joint = weights + likelihoods[:, row, token]
        expected = expected - joint.logsumexp(0)
        responsibilities += joint.softmax(0).detach()
    torch.testing.assert_close(objective, expected)
    torch.testing.assert_close(sums, torch.cat([expected.detach()[None], responsibilities]))
    trained = [p for p in model.parameters() if p.requires_grad]
    for mine, theirs in zip(*(torch.autograd.grad(loss, trained) for loss in (objective, expected)), strict=True):
        torch.testing.assert_close(mine, theirs)


@examples(15)
@given(st.data())
def test_tokens_of_a_row_may_have_different_adapters(data):
    """As documents that chose theirs do: each like a row of its own, in value and gradient."""
    model = made({"names": ("a", "b", "c"), "r": {"a": 2, "b": 5, "c": 3}})
    lengths = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=5))
    chosen = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=len(lengths), max_size=len(lengths))))
    row = ids(1, sum(lengths))
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    together = model(row, position_ids, adapters=chosen.repeat_interleave(torch.tensor(lengths))[None])
    parts = zip(row.split(lengths, 1), chosen.split(1), strict=True)
    alone = torch.cat([model(part, adapters=adapter) for part, adapter in parts], 1)
    torch.testing.assert_close(together, alone)
    trained, weights = [p for p in model.parameters() if p.requires_grad], torch.randn(together.shape).double()
    for mine, theirs in zip(
        *(torch.autograd.grad((each * weights).sum(), trained) for each in (together, alone)), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_new_adapters_compute_what_the_base_does():
    config = ModelConfig(**SHAPE, adapters=AdaptersConfig(names=("a", "b")))
    model, rows = Llama(config, seed=2), ids(2)
    torch.testing.assert_close(model(rows, adapters=torch.tensor([0, 1])), model(rows), rtol=0, atol=0)
    torch.testing.assert_close(model(rows), Llama(ModelConfig(**SHAPE), seed=2)(rows), rtol=0, atol=0)


def test_initial_values_of_an_adapter_depend_on_its_name_only():
    few, many = (
        Llama(ModelConfig(**SHAPE, adapters=AdaptersConfig(names=names)), seed=3).state_dict()
        for names in (("b",), ("a", "b", "c"))
    )
    for name, value in few.items():
        torch.testing.assert_close(value, many[name], rtol=0, atol=0)
    one, other = (many[f"layers.0.mlp.up_proj.lora_A_{name}"] for name in "ab")
    assert not torch.equal(one, other)
    bound = SHAPE["hidden_size"] ** -0.5
    assert one.abs().max() <= bound
    assert one.std() == pytest.approx(bound / 3**0.5, rel=0.1)


@pytest.mark.parametrize("adapters", [{"r": 3}, {"last_layers": 1}, {"target_modules": ["k_proj"], "train_base": True}])
def test_counts_are_those_of_the_model(adapters):
    config = ModelConfig(**SHAPE, adapters=AdaptersConfig(names=("a", "b"), **adapters))
    model = Llama(config)
    assert config.num_parameters() == sum(p.numel() for p in model.parameters())
    assert config.num_trained_parameters() == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("adapters", "sentence"),
    [
        ({"names": ["a", "a"]}, "two adapters are called 'a'"),
        ({"names": ["a.b"]}, "no name for an adapter"),
        ({"names": ["a", "base"]}, "commands mean something else by it"),
        ({"names": ["a"], "target_modules": ["c_attn"]}, "q_proj"),
        ({"names": ["a"], "target_modules": []}, "at least one"),
        ({"names": ["a"], "r": 33}, "above the rank 32 of q_proj"),
        ({"names": ["a"], "r": {"b": 3}}, "for each of names"),
        ({"names": ["a"], "use_dora": True}, "use_dora is PEFT's"),
        ({"names": ["a"], "last_layers": 4}, "there are 3 layers"),
        ({"names": ["a", "b"], "mode": "single"}, "single is for one adapter"),
        ({"r": 3}, "without adapters.names"),
        ({"names": ["a"], "evidence": 0.5}, "prior, prior_lr and evidence are of mode mixture"),
        ({"names": ["a", "b"], "mode": "mixture", "prior": {"a": 1}}, "prior has to have a value for each"),
        ({"names": ["a", "b"], "mode": "mixture", "prior": {"a": 0, "b": 0}}, "greater than 0"),
    ],
)
def test_what_cannot_be_is_said(adapters, sentence):
    with pytest.raises(ValidationError, match=sentence):
        ModelConfig(**SHAPE | {"num_key_value_heads": 4}, adapters=adapters)
