"""The prior of a mixture: one for all rows or one for each source, and the gradient by which it is learned."""

import pytest
import torch

from model.adapter_config import AdaptersConfig
from model.config import ModelConfig
from model.llama import Llama
from model.loss import IGNORED
from model.prior import Prior

BY_SOURCE = {"plays": {"a": 1, "b": 3}, "manuals": {"a": 1, "b": 1}}


def adapters(**more) -> AdaptersConfig:
    return AdaptersConfig(names=("a", "b"), mode="mixture", **more)


def test_a_row_has_the_prior_of_its_source():
    prior = Prior(adapters(prior=BY_SOURCE))
    prior.know(["manuals", "elsewhere", "plays"])
    found = prior.log(prior.logits, torch.tensor([2, 0, 1, 2])).exp()
    torch.testing.assert_close(found[0], torch.tensor([0.25, 0.5, 0.375, 0.25]).double())
    torch.testing.assert_close(found.sum(0), torch.ones(4).double())
    torch.testing.assert_close(prior.log(prior.logits, None).exp(), torch.tensor([[0.375], [0.625]]).double())


def test_without_sources_it_is_of_all_rows():
    prior = Prior(adapters(prior={"a": 1, "b": 4}))
    prior.know(["plays"])
    for sources in (None, torch.tensor([0, 0])):
        torch.testing.assert_close(prior.log(prior.logits, sources).exp(), torch.tensor([[0.2], [0.8]]).double())


@pytest.mark.parametrize("prior", [{}, {"a": 1, "b": 4}, BY_SOURCE])
def test_a_config_takes_a_learned_table(prior):
    config = adapters(prior=prior)
    table = [[0.1, 0.9], [0.7, 0.3]][: len(config.prior_table)]
    learned = config.with_prior(table)
    assert learned.prior_table == [pytest.approx(row) for row in table]
    assert learned.prior_sources == config.prior_sources
    assert AdaptersConfig.model_validate(learned.model_dump()) == learned


@pytest.mark.parametrize("evidence", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("prior", [{"a": 1, "b": 4}, BY_SOURCE])
def test_its_gradient_is_the_loss_difference(evidence, prior):
    config = ModelConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        adapters=adapters(prior=prior, evidence=evidence, prior_lr=0.1, r=2),
    )
    model = Llama(config, seed=1).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    ids = torch.randint(31, (3, 12), generator=torch.Generator().manual_seed(2))
    targets = ids.roll(-1, 1)
    targets[:, 5] = IGNORED
    positions = torch.arange(12).repeat(3, 1)
    positions[1, 7:] -= 7
    head = model.lm_head.loss
    head.know(["plays", "manuals"])

    def sums() -> torch.Tensor:
        return model(ids, positions, targets, sources=torch.tensor([0, 1, 1]))[1]

    gradient = sums()[-head.prior.logits.numel() :].view_as(head.prior.logits)
    assert len(sums()) == head.num_sums
    for place in torch.cartesian_prod(*map(torch.arange, head.prior.logits.shape)).tolist():
        losses = []
        for step in (1e-6, -2e-6):
            head.prior.logits[tuple(place)] += step
            losses.append(sums()[0])
        head.prior.logits[tuple(place)] += 1e-6
        torch.testing.assert_close(gradient[tuple(place)], (losses[0] - losses[1]) / 2e-6, rtol=1e-5, atol=1e-6)
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"prior": {"plays": {"a": 1}}}, "prior.plays has to have a value for each of names and no other: look at 'b'"),
        ({"prior": {"plays": {"a": 0, "b": 0}}}, "greater than 0"),
        ({"prior_lr": 0.0}, "greater than 0"),
        ({"prior_lr": 0.1, "mode": "hard"}, "prior, prior_lr and evidence are of mode mixture"),
    ],
)
def test_what_cannot_be_is_said(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        AdaptersConfig.model_validate({"names": ["a", "b"], "mode": "mixture"} | given)
