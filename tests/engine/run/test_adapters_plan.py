"""What adapters cannot be is said before anything starts."""

import json
import re

import pytest
import torch

from engine.run.memory import check_memory
from engine.run.plan import RunPlan, make_plan
from launch.topology import Topology
from model.adapter_config import AdaptersConfig
from model.hf.peft import save_peft
from model.hf.weights import save_hf
from model.llama import Llama
from storage.manifest import read_manifest, save_manifest
from tests.engine.programs import prepare, zero
from tests.training.corpus import build
from training.config import load_recipe
from training.routing import labels_of_sources

NAMES = {"adapters.names": "[long, short]", "adapters.r": "4"}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A recipe, data with the sources long and short, a base, and an adapter of PEFT's for it."""
    folder = tmp_path_factory.mktemp("plan")
    recipe, data = prepare(folder)
    config = load_recipe(recipe, {}).model
    save_hf(config, Llama(config, seed=1).state_dict().items(), folder / "base")
    adapted = Llama(config.model_copy(update={"adapters": AdaptersConfig(names=("long",), r=4)}), seed=1)
    save_peft(adapted.config, "long", adapted.state_dict(), folder / "peft", None)
    return folder, recipe, data


def plan(setting, overrides: dict, ds_config: dict | None = None, ranks: int = 1) -> RunPlan:
    folder, recipe, data = setting
    (folder / "ds.json").write_text(json.dumps(ds_config or zero(2)))
    here = Topology(0, 0, ranks, torch.device("cpu"))
    return make_plan(recipe, NAMES | overrides, str(folder / "ds.json"), data, here)


def test_rows_find_their_adapters(setting):
    found = plan(setting, {"adapters.names": "[short, long]"})
    places = labels_of_sources(found.recipe.adapters, found.dataset, found.sources).adapters
    assert [found.recipe.adapters.names[place] for place in places] == found.dataset.sources


@pytest.mark.parametrize(
    ("overrides", "ds_config", "ranks", "sentence"),
    [
        ({"adapters.names": "[long]"}, None, 1, "adapters: no adapter is called 'short' as a source of"),
        (
            {"adapters.names": "[long, short, third]"},
            None,
            1,
            "'third' has nothing to learn from: the sources of the data are",
        ),
        (
            {"objective.name": "masked"},
            None,
            1,
            "adapters are trained on the objectives causal and contrastive, not masked",
        ),
        ({"optimizer.name": "lion"}, None, 1, "adapters are trained by the optimizer adamw, not lion"),
        (
            {"adapters.last_layers": "1"},
            zero(1, pipeline={"stages": 2}),
            2,
            "rank 0 of the pipeline would have no adapters",
        ),
        ({}, zero(0, gradient_compression={"method": "powersgd"}), 2, "gradient_compression is for whole models"),
        ({}, zero(3, zero={"sub_group_size": 100}), 1, "would divide an adapter of"),
        ({"adapters.initial_weights": "{long: nowhere}"}, None, 1, "name it in training.initial_weights"),
        ({"adapters.initial_weights": "{other: nowhere}"}, None, 1, "'other' is not one of the adapters long, short"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(setting, overrides, ds_config, ranks, sentence):
    with pytest.raises(ValueError, match=sentence):
        plan(setting, overrides, ds_config, ranks)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({}, None),
        ({"adapters.r": "8"}, "has r 4 but the recipe's is 8"),
        ({"adapters.lora_alpha": "8"}, r"has lora_alpha 32.0 but the recipe's is 8.0"),
        ({"adapters.last_layers": "2"}, "has last_layers 4 but the recipe's is 2"),
        ({"adapters.target_modules": "[q_proj]"}, "has target_modules .* but the recipe's is"),
        ({"model.intermediate_size": "80"}, "it is an adapter of another model"),
    ],
)
def test_an_adapter_to_start_from_has_to_fit(setting, overrides, sentence):
    folder, *_ = setting
    start = {"training.initial_weights": str(folder / "base"), "adapters.initial_weights": f"{{long: {folder}/peft}}"}
    if sentence is None:
        plan(setting, start | overrides)
        return
    with pytest.raises(ValueError, match=sentence):
        plan(setting, start | overrides)


def test_a_source_that_only_validation_has_needs_an_adapter_too(tmp_path):
    """One whose few documents were all put there by their hash."""
    recipe, _ = prepare(tmp_path / "whole")
    lengths = {"long": [200] * 4, "rare": [200] * 4}
    build(tmp_path / "data", lengths, 64, vocab_size=256, splits=("train", "validation"))
    manifest = read_manifest(tmp_path / "data")
    empty = manifest.splits["train"]["rare"].model_copy(update={"rows": 0, "shards": []})
    splits = manifest.splits | {"train": manifest.splits["train"] | {"rare": empty}}
    save_manifest(tmp_path / "data", manifest.model_copy(update={"splits": splits}))
    (tmp_path / "ds.json").write_text(json.dumps(zero(2)))
    here = Topology(0, 0, 1, torch.device("cpu"))
    with pytest.raises(ValueError, match="no adapter is called 'rare' as a source of"):
        make_plan(recipe, {"adapters.names": "[long]"}, str(tmp_path / "ds.json"), str(tmp_path / "data"), here)


@pytest.mark.parametrize(("mode", "least", "most"), [("routed", 0.66, 1), ("hard", 1.33, 2), ("mixture", 1.33, 3)])
def test_what_adapters_cost_is_said(setting, mode, least, most):
    """Of two adapters, against training the whole model: a frozen matrix has no gradient of its own."""
    more = {"adapters.names": "[short, long]", "adapters.mode": mode, "training.z_loss_weight": "0"}
    text = check_memory(plan(setting, more), Topology(0, 0, 1, torch.device("cpu")))
    found = re.search(rf"\narithmetic: 2 adapters in mode {mode} take [\d.]+ MFLOP a token, ([\d.]+) times", text)
    assert least < float(found[1]) < most


@pytest.mark.parametrize(
    ("sources", "sentence"),
    [
        (("long",), "adapters.prior has nothing for 'short', a source of"),
        (("long", "short", "third"), "adapters.prior: there is no 'third': the sources of the data are long, short"),
    ],
)
def test_priors_are_those_of_the_sources(setting, sources, sentence):
    prior = ", ".join(f"{source}: {{a: 1, b: 2}}" for source in sources)
    more = {"adapters.names": "[a, b]", "adapters.mode": "mixture", "training.z_loss_weight": "0"}
    with pytest.raises(ValueError, match=re.escape(sentence)):
        plan(setting, more | {"adapters.prior": f"{{{prior}}}"})
