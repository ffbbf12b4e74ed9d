"""Every key of a recipe and of a DeepSpeed JSON with every JSON type: a plan, or sentences, and never a traceback."""

import copy
import functools
import itertools
import json
from pathlib import Path

import pytest
import yaml

import engine.run.plan
import training.config
from tests.engine.ds_json.test_values import PLACES, VALUES
from tests.engine.programs import prepare
from tests.engine.run.test_plan import plan
from training.config import Recipe, load_recipe

RECIPE_PLACES = [(section,) for section in Recipe.model_fields]
RECIPE_PLACES += [
    (section, key)
    for section, field in Recipe.model_fields.items()
    for key in getattr(field.annotation, "model_fields", ())
]
ROPE_KEYS = ("rope_type", "factor", "original_max_position_embeddings", "beta_fast", "attention_factor", "short_factor")
RECIPE_PLACES += [("model", "rope_scaling", key) for key in (*ROPE_KEYS, "type", "other")]
RECIPE_PLACES += [("stages", 0, key) for key in ("name", "max_steps", "max_tokens", "data", "weights", "other")]
ODD = [*VALUES, float("nan"), float("inf"), [[1]], [{}], [None], {"x": {"y": 1}}, "\x00", "a/b"]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("values")
    recipe, data = prepare(folder)
    (folder / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    return folder, recipe, data


def put(tree: dict, place: tuple, value) -> dict:
    at = tree
    for part in place[:-1]:
        at = at[part] if isinstance(at, list) else at.setdefault(part, {})
    at[place[-1]] = json.loads(json.dumps(value))
    return tree


def faults(setting, **files) -> list[str]:
    """What else than a plan or sentences comes of these files."""
    try:
        plan(setting, **files)
    except ValueError as error:  # not a library's own, whose text is no sentence
        return [] if type(error) is ValueError and all(str(error).split("\n")) else [repr(error)]
    except Exception as error:
        return [repr(error)]
    return []


def test_a_recipe(setting, monkeypatch):
    """Each key with each value, all of them. The data are read once; how YAML is read is not tried here."""
    monkeypatch.setattr(engine.run.plan, "open_split", functools.cache(engine.run.plan.open_split))
    tree, failed = yaml.safe_load(Path(setting[1]).read_text()), []
    for place, value in itertools.product(RECIPE_PLACES, ODD):
        odd = copy.deepcopy(tree)
        if place[0] == "stages" and len(place) == 3:
            odd["stages"] = [{"max_steps": 4}]
            del odd["training"]["max_steps"]
        if place[1:2] == ("rope_scaling",):
            odd["model"]["rope_scaling"] = {"rope_type": "yarn", "factor": 2.0}
        put(odd, place, value)
        monkeypatch.setattr(training.config, "read_yaml", lambda _, odd=odd: copy.deepcopy(odd))
        failed += [(place, value, fault) for fault in faults(setting)]
    assert not failed


def test_a_json(setting, monkeypatch):
    """Each key with each value, all of them; the four stages take turns. Recipe and data are read once."""
    recipe = load_recipe(setting[1], {})
    monkeypatch.setattr(engine.run.plan, "load_recipe", lambda *_: recipe)
    monkeypatch.setattr(engine.run.plan, "config_json_notices", lambda *_: [])
    monkeypatch.setattr(engine.run.plan, "open_split", functools.cache(engine.run.plan.open_split))
    file, failed = setting[0] / "odd.json", []
    for number, (place, value) in enumerate(itertools.product(PLACES, VALUES)):
        stage = (number + number // len(VALUES)) % 4
        file.write_text(json.dumps(put({"zero_optimization": {"stage": stage}}, place, value)))
        failed += [(place, value, stage, fault) for fault in faults(setting, ds_config=file)]
    assert not failed
