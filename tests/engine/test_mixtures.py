"""Adapters whose likelihoods are mixed, or chosen by documents, are trained alike in every layout."""

from pathlib import Path

import numpy as np
import pytest
import torch

from engine.run.loop import new_state
from engine.run.plan import make_plan
from engine.run.samples import StepSamples
from launch.topology import Topology
from model.adapter_config import AdaptersConfig, adapter_of
from model.config import ModelConfig
from model.documents import Documents
from model.hf.peft import PeftAdapter, save_peft
from model.hf.weights import load_hf, save_hf
from model.llama import Llama
from tests.engine.kept import kept
from tests.engine.programs import interrupted, prepare, zero
from tests.engine.test_adapters import ADAPTERS, STEPS
from tests.engine.test_layouts import KEYS, RECOMPUTE, ROWS, SEQUENCE, SPLIT, TENSOR, pipeline
from training.config import load_recipe
from training.optimizer import parameter_groups
from training.schedule import lr_factor

MODES = {
    "mixture": {
        "adapters.lora_dropout": "0.2",
        "adapters.evidence": "0.9",
        "adapters.prior": "{long: {long: 1, short: 3}, short: {long: 1, short: 1}}",
        "adapters.prior_lr": "0.1",
        "training.z_loss_weight": "0",
    },
    "hard": {"adapters.lora_dropout": "0.2", "adapters.prior": "{long: 2, short: 3}"},
}
MIXED = {
    1: {"zero0": (zero(0), {})},
    2: {
        "zero2-accumulate-recompute": (zero(2), SPLIT | RECOMPUTE),
        "zero3-last": (zero(3), {}),
        "pipeline2-accumulate": (pipeline(2), SPLIT),
        "sequence2-zero1": (zero(1, **SEQUENCE), {}),
        "keys2-zero3": (zero(3, **KEYS), {}),
        "tensor2-zero0": (zero(0, **TENSOR), {}),
        "rows2-zero2": (zero(2, **ROWS), {}),
    },
    4: {"pipeline2-rows2": (pipeline(2, **ROWS), {}), "tensor2-sequence2-zero1": (zero(1, **TENSOR, **SEQUENCE), {})},
}
HARD = {
    1: ["zero0"],
    2: ["zero2-accumulate-recompute", "zero3-last", "pipeline2-accumulate", "keys2-zero3", "tensor2-zero0"],
}
HARD[4] = ["pipeline2-rows2"]
RUNS = [("mixture", ranks, name) for ranks, layouts in MIXED.items() for name in layouts]
RUNS += [("hard", ranks, name) for ranks, names in HARD.items() for name in names]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A recipe, data, and what is changed in the recipe: a base, and two adapters of PEFT's that differ to start from."""
    folder = tmp_path_factory.mktemp("mixtures")
    recipe, data = prepare(folder)
    config = load_recipe(recipe, ADAPTERS).model
    base = {name: tensor for name, tensor in Llama(config, seed=11).state_dict().items() if adapter_of(name) is None}
    save_hf(load_recipe(recipe, {}).model, base.items(), folder / "base")
    return folder, recipe, data, ADAPTERS | {"training.initial_weights": str(folder / "base")}


def starts(folder: Path, config: ModelConfig) -> dict[str, str]:
    """Overrides by which adapters of this model begin with second factors that are not zero."""
    if not (folder / f"{config.adapters.last_layers}-long").exists():
        other = Llama(config, seed=5)
        generator = torch.Generator().manual_seed(6)
        with torch.no_grad():
            for name, parameter in other.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        for name in config.adapters.names:
            save_peft(config, name, other.state_dict(), folder / f"{config.adapters.last_layers}-{name}", None)
    places = [f"{name}: {folder}/{config.adapters.last_layers}-{name}" for name in config.adapters.names]
    return {"adapters.initial_weights": f"{{{', '.join(places)}}}"}


def changes(setting, mode: str, name: str) -> dict[str, str]:
    """Of the recipe, for a run in this layout."""
    folder, recipe, _, overrides = setting
    layers = {"adapters.last_layers": "2" if name.endswith("last") else "4"}
    some = overrides | MODES[mode] | layers | {"adapters.mode": mode}
    return some | starts(folder, load_recipe(recipe, some).model)


@pytest.fixture(scope="module")
def reference(setting):
    """Losses, shares and priors of each step, and the weights, of plain torch."""
    folder, recipe_file, data, _ = setting

    @kept
    def run(mode: str, last: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict]:
        (folder / "mixture.json").write_text('{"zero_optimization": {"stage": 0}}')
        some = changes(setting, mode, "last" if last else "")
        alone = Topology(0, 0, 1, torch.device("cpu"))
        plan = make_plan(recipe_file, some, str(folder / "mixture.json"), data, alone)
        recipe = plan.recipe
        model = Llama(recipe.model, seed=recipe.training.seed)
        model.load_state_dict(dict(load_hf(folder / "base")[1]), strict=False)
        plain = recipe.model.model_copy(update={"adapters": AdaptersConfig()})
        for name, place in recipe.adapters.initial_weights.items():
            model.load_state_dict(PeftAdapter(Path(place), plain).state(name), strict=False)
        groups = parameter_groups(model, recipe.optimizer)
        how = {"lr": 1.0, "betas": recipe.optimizer.betas, "eps": recipe.optimizer.eps}
        optimizer, prior = torch.optim.AdamW(groups, **how), model.lm_head.loss.prior
        of_prior = torch.optim.Adam([prior.logits], **how)
        model.lm_head.loss.know(plan.sources)
        state, samples, history = new_state(plan), StepSamples(plan), []
        for step in range(STEPS):
            batches = samples.after(state)
            state.advance(plan.batch.samples, plan.step_tokens, applied=True)
            keys = ("input_ids", "position_ids", "targets", "sources", "seeds")
            whole = {key: torch.cat([batch[key] for batch in batches]) for key in keys}
            count, shares = sum(batch["num_targets"] for batch in batches), None
            if mode == "hard":
                with torch.no_grad():
                    places = model(**{key: whole[key] for key in keys if key != "seeds"})[1][3:].long()
                lengths = torch.tensor(Documents.from_position_ids(whole["position_ids"]).lengths)
                whole["adapters"] = places.repeat_interleave(lengths).view(whole["input_ids"].shape)
                shares = torch.bincount(whole["adapters"][whole["targets"] >= 0], minlength=2)
            objective, sums = model(**whole, z_loss_weight=recipe.training.z_loss_weight)
            (objective / count).backward()
            factor = lr_factor(recipe.schedule, step + 1, plan.total_steps, plan.step_tokens)
            for group in optimizer.param_groups:
                torch.nn.utils.clip_grad_norm_(group["params"], recipe.optimizer.max_grad_norm)
                group["lr"] = recipe.optimizer.lr * factor
            optimizer.step()
            optimizer.zero_grad()
            if mode == "mixture":
                prior.logits.grad = sums[-4:].view(2, 2) / count
                of_prior.param_groups[0]["lr"] = recipe.adapters.prior_lr * factor
                of_prior.step()
                shares = sums[1:-4].view(2, 2).sum(0)
            history.append([float(sums[0]) / count, *(shares / count).tolist(), *prior.logits.softmax(-1).flatten()])
        figures = np.array(history)
        weights = {key: p.detach().numpy() for key, p in model.named_parameters() if p.requires_grad}
        return figures[:, 0], figures[:, 1:3], figures[:, 3:], weights

    return run


@pytest.fixture(scope="module")
def mixed(setting, on_ranks):
    folder, recipe, data, _ = setting

    @kept
    def run(mode: str, ranks: int, name: str) -> list[dict]:
        config, more = MIXED[ranks][name]
        some = changes(setting, mode, name) | more
        arguments = str(folder / f"{mode}{ranks}"), recipe, data, {name: (config, some)}
        return [rank[name] for rank in on_ranks(ranks, interrupted, *arguments)]

    return run


@pytest.mark.parametrize(("mode", "ranks", "name"), RUNS)
def test_a_step_is_the_same_in_every_layout(mixed, reference, mode, ranks, name):
    losses, shares, priors, weights = reference(mode, name.endswith("last"))
    assert (shares > 0.1).all(), "both adapters have something to do"
    results = mixed(mode, ranks, name)
    history = results[0]["history"]
    np.testing.assert_allclose([step["loss"] for step in history], losses, rtol=1e-6)
    found = [list(step["adapters"]["adapter_shares"].values()) for step in history]
    np.testing.assert_allclose(found, shares, rtol=1e-5)
    effective = np.exp(-(shares * np.log(shares)).sum(1))
    np.testing.assert_allclose([step["adapters"]["effective_adapters"] for step in history], effective, rtol=1e-5)
    if mode == "mixture":
        found = [[list(row.values()) for row in step["adapters"]["adapter_prior"].values()] for step in history]
        np.testing.assert_allclose(np.reshape(found, priors.shape), priors, rtol=1e-5)
        assert np.abs(priors[-1] - priors[0]).max() > 0.05, "it is learned"
    for step in history:
        shares_of_sources = step["adapters"]["adapter_shares_of_sources"]
        assert shares_of_sources.keys() <= {"long", "short"}
        assert all(sum(each.values()) == pytest.approx(1) for each in shares_of_sources.values())
    held = {key: value for rank in results for key, value in rank["weights"].items()}
    assert held.keys() == weights.keys()
    for key, value in weights.items():
        np.testing.assert_allclose(held[key], value, atol=2e-6, rtol=1e-6, err_msg=key)


@pytest.mark.parametrize(("mode", "ranks", "name"), RUNS)
def test_a_run_continues_to_the_bit(mixed, mode, ranks, name):
    for rank in mixed(mode, ranks, name):
        assert rank["history"] == rank["expected"]
