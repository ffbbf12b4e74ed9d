"""Every key of a recipe and of a DeepSpeed JSON with every JSON type: a plan, or sentences, and never a traceback."""

import functools
import itertools
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import engine.run.plan
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


def planned_or_refused(setting, **files) -> None:
    sentences, kind = ["taken"], ValueError
    try:
        plan(setting, **files)
    except ValueError as error:
        sentences, kind = str(error).split("\n"), type(error)
    assert kind is ValueError  # not a library's own, whose text is no sentence
    assert all(sentences)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(RECIPE_PLACES), st.sampled_from(ODD))
def test_a_recipe(setting, place, value):
    tree = yaml.safe_load(Path(setting[1]).read_text())
    if len(place) == 3:
        tree["stages"] = [{"max_steps": 4}]
        del tree["training"]["max_steps"]
    file = setting[0] / "odd.yaml"
    file.write_text(yaml.safe_dump(put(tree, place, value)))
    planned_or_refused((setting[0], str(file), setting[2]))


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
        try:
            planned_or_refused(setting, ds_config=file)
        except Exception as error:
            failed.append((place, value, stage, repr(error)))
    assert not failed
