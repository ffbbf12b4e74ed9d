"""The recipe: shipped ones load, every mistake is named with its place, nothing but a ValueError comes out."""

import argparse
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from training.config import Recipe, add_recipe_flags, config_json_notices, load_recipe
from training.foreign_names import TRANSFORMERS_NAMES
from training.sections import StageConfig

SHIPPED = sorted(Path("recipes").glob("*.yaml"))
SIZES_IN_MILLIONS = {
    "tiny": (7, 9),
    "tiny-adapters": (9, 10),
    "tiny-search": (9, 10),
    "tiny-long": (5, 6),
    "llama-125m": (110, 140),
    "masked-lm-125m": (105, 140),
    "block-diffusion-125m": (105, 140),
    "llama-1b": (1200, 1300),
    "llama-1b-long": (1200, 1300),
    "llama-7b": (6700, 6800),
    "llama-8b": (8000, 8100),
    "llama-70b": (68900, 69100),
}
MINIMAL = """
model: {vocab_size: 64, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4}
training: {global_batch_tokens: 512, max_steps: 10}
"""


def load(tmp_path, text: str, overrides: dict[str, str] | None = None) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides or {})


def problems(tmp_path, text: str, overrides: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ValueError) as caught:
        load(tmp_path, text, overrides)
    return str(caught.value).replace(f"{tmp_path}/", "").splitlines()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_have_the_size_in_their_name(path):
    recipe = load_recipe(path, {})
    low, high = SIZES_IN_MILLIONS[path.stem]
    assert low <= recipe.model.num_parameters() / 1e6 <= high
    assert recipe.training.global_batch_tokens % min(4096, recipe.model.max_position_embeddings) == 0


def test_every_mistake_is_reported_at_once(tmp_path):
    found = problems(
        tmp_path,
        """
model: {vocab_size: 64, hiden_size: 32, intermediate_size: 64, num_hidden_layers: two, num_attention_heads: 4}
training: {global_batch_tokens: 512, max_steps: 10, max_tokens: 100}
optimiser: {}
optimizer: {lr: -1}
""",
        {"schedule.warmup": "3", "data.num_workers": "-1"},
    )
    for sentence in (
        "recipe.yaml: model.hiden_size: unknown key; did you mean 'hidden_size'?",
        "recipe.yaml: model.hidden_size is required",
        "recipe.yaml: training: give exactly one of training.max_steps and training.max_tokens",
        "recipe.yaml: optimiser: unknown key; did you mean 'optimizer'?",
        "--schedule.warmup: unknown key; did you mean 'warmup_steps'?",
    ):
        assert sentence in found
    assert any(line.startswith("recipe.yaml: model.num_hidden_layers:") and "'two'" in line for line in found)
    assert any(line.startswith("recipe.yaml: optimizer.lr:") and "-1" in line for line in found)
    assert any(line.startswith("--data.num_workers:") for line in found)
    assert len(found) == 8


@pytest.mark.parametrize(
    ("key", "right"),
    [
        ("optimizer.learning_rate", "optimizer.lr"),
        ("training.learning_rate", "optimizer.lr"),
        ("training.logging_steps", "logging.log_every_steps"),
        ("checkpoint.save_total_limit", "checkpoint.keep_last"),
        ("training.max_grad_norm", "optimizer.max_grad_norm"),
        ("training.gradient_checkpointing", "training.activation_checkpointing"),
        ("model.seed", "training.seed"),
        ("save_steps", "checkpoint.every_steps"),
    ],
)
def test_names_of_transformers_and_of_other_sections_lead_to_the_key(tmp_path, key, right):
    tree = yaml.safe_load(MINIMAL)
    section, _, name = key.rpartition(".")
    (tree.setdefault(section, {}) if section else tree)[name] = 1
    assert f"recipe.yaml: {key}: unknown key; did you mean {right!r}?" in problems(tmp_path, yaml.dump(tree))


@pytest.mark.parametrize(("given", "read"), [("true", True), ("false", False), ("0", 0), ("1", 1), ("2", 2)])
def test_blocks_are_recomputed_all_or_so_many(tmp_path, given, read):
    found = load(tmp_path, MINIMAL, {"training.activation_checkpointing": given}).training.activation_checkpointing
    assert (found, type(found)) == (read, type(read))


@pytest.mark.parametrize(
    ("given", "part"), [("3", "3 is more than the model's 2 blocks"), ("-1", "activation_checkpointing")]
)
def test_more_blocks_than_there_are_cannot_be_recomputed(tmp_path, given, part):
    assert part in problems(tmp_path, MINIMAL, {"training.activation_checkpointing": given})[0]


def test_what_other_names_lead_to_is_a_key(tmp_path):
    for right in TRANSFORMERS_NAMES.values():
        section, key = right.split(".")
        assert key in Recipe.model_fields[section].annotation.model_fields


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("model: [1", "not valid YAML"),
        ("- 1", "a mapping of keys"),
        ("", "a mapping of keys"),
        (MINIMAL + "optimizer: {lr: 1.0, lr: 2.0}", "'lr' is given twice"),
        ("? [1]\n: 2", "recipe.yaml"),
        ("a: !!python/object:os.system {}", "not valid YAML"),
        ("model: 3\ntraining: {global_batch_tokens: 1, max_steps: 1}", "model"),
        ("&a [*a]", "recipe.yaml"),
    ],
)
def test_unreadable_recipes(tmp_path, text, part):
    assert part in "\n".join(problems(tmp_path, text))


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "absent.yaml", tmp_path):
        with pytest.raises(ValueError, match=str(path)):
            load_recipe(path, {})


def test_overrides_are_yaml_and_win(tmp_path):
    overrides = {"optimizer.lr": "3e-4", "optimizer.betas": "[0.8, 0.9]", "optimizer.max_grad_norm": "null"}
    recipe = load(tmp_path, MINIMAL + "optimizer: {lr: 1.0}", overrides | {"data.weights": "{a: 1, b: 2.5}"})
    assert recipe.optimizer.lr == 3e-4
    assert recipe.optimizer.betas == (0.8, 0.9)
    assert recipe.optimizer.max_grad_norm is None
    assert recipe.data.weights == {"a": 1, "b": 2.5}


def test_every_key_is_a_flag_with_help(tmp_path):
    parser = argparse.ArgumentParser()
    add_recipe_flags(parser)
    given_flags = parser.parse_args(["--optimizer.lr", "0.5", "--model.hidden_size", "64"])
    assert vars(given_flags) == {"optimizer.lr": "0.5", "model.hidden_size": "64"}
    flags = [action for action in parser._actions if "." in action.dest]
    sections = [section.annotation for name, section in Recipe.model_fields.items() if name != "stages"]
    assert len(flags) == sum(len(section.model_fields) for section in sections)
    assert vars(parser.parse_args(["--stages", "[]"])) == {"stages": "[]"}
    assert all(len(action.help) > 20 for action in flags)


STAGED = MINIMAL.replace(", max_steps: 10", "") + "stages: [{name: short, max_steps: 3}, {max_tokens: 600, data: long}]"


def test_stages_make_the_length_of_the_run(tmp_path):
    recipe = load(tmp_path, STAGED)
    assert [stage.name for stage in recipe.all_stages] == ["short", "stage-2"]
    assert [stage.steps(512) for stage in recipe.all_stages] == [3, 2]
    for agreeing in ({"training.max_steps": "5"}, {"training.max_tokens": "2560"}):
        assert load(tmp_path, STAGED, agreeing).stages == recipe.stages
    (alone,) = load(tmp_path, MINIMAL).all_stages
    assert (alone.steps(512), alone.data, alone.weights) == (10, None, None)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"training.max_steps": "6"}, "training.max_steps makes 6 steps but the stages add up to 5"),
        ({"training.max_tokens": "512"}, "training.max_tokens makes 1 steps but the stages add up to 5"),
        ({"stages": "[]"}, "give exactly one of training.max_steps and training.max_tokens, or stages"),
        ({"stages": "[{name: a, max_steps: 1}, {name: a, max_steps: 1}]"}, "stages: two are called 'a'"),
        ({"stages": "[{max_steps: 1}, {name: stage-1, max_steps: 1}]"}, "stages: two are called 'stage-1'"),
        ({"stages": "[{}]"}, "--stages.0: give exactly one of max_steps and max_tokens"),
        ({"stages": "[{max_steps: 1, weight: {}}]"}, "--stages.0.weight: unknown key; did you mean 'weights'?"),
        ({"stages": "{max_steps: 1}"}, "--stages: input should be a valid list, got {'max_steps': 1}"),
    ],
)
def test_stages_that_cannot_be(tmp_path, overrides, sentence):
    assert sentence in problems(tmp_path, STAGED, overrides)[0]


def test_what_is_left_out_of_a_config_json_is_said_once_wherever_the_recipe_names_it(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text(json.dumps({"model_type": "llama", "use_cache": True, "my_own_key": 3}))
    said = [
        f"{tmp_path}/hf/config.json: use_cache: left out, without meaning for the architecture",
        f"{tmp_path}/hf/config.json: my_own_key: unknown here and left out",
    ]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(MINIMAL)
    start = {"training.initial_weights": str(tmp_path / "hf")}
    both = start | {"model.config_json": str(tmp_path / "hf/config.json")}
    assert config_json_notices(recipe, start) == config_json_notices(recipe, both) == said
    assert config_json_notices(recipe, start, fresh=False) == []  # a run that goes on does not read it
    assert config_json_notices(recipe, {"training.initial_weights": str(tmp_path)}) == []


def test_config_json_of_hugging_face_is_a_model(tmp_path):
    from transformers import LlamaConfig

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    theirs = LlamaConfig(vocab_size=99, num_key_value_heads=2, rope_theta=5e5, tie_word_embeddings=True, **shape)
    theirs.save_pretrained(tmp_path / "hf")
    text = "model: {config_json: hf/config.json, max_position_embeddings: 128}\n" + MINIMAL.splitlines()[2]
    recipe = load(tmp_path, text)
    assert recipe.model.vocab_size == 99
    assert recipe.model.kv_heads == 2
    assert recipe.model.rope_theta == 5e5
    assert recipe.model.tie_word_embeddings
    assert recipe.model.max_position_embeddings == 128
    absent = text.replace("hf/", "absent/")
    assert "does not exist" in problems(tmp_path, absent)[0]


def test_a_recipe_survives_its_own_json(tmp_path):
    recipe = load(tmp_path, MINIMAL)
    assert Recipe.model_validate(json.loads(recipe.model_dump_json())) == recipe


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)
sections = {
    name: anything
    | st.dictionaries(st.sampled_from(sorted(field.annotation.model_fields)) | st.text(max_size=5), anything)
    for name, field in Recipe.model_fields.items()
    if name != "stages"
}
stage = st.dictionaries(st.sampled_from(sorted(StageConfig.model_fields)) | st.text(max_size=5), anything)
sections["stages"] = anything | st.lists(stage, max_size=3)


@examples(200)
@given(st.fixed_dictionaries({}, optional=sections) | anything, st.text(max_size=20))
def test_any_yaml_loads_or_is_refused_in_sentences(tmp_path, tree, override):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    try:
        load_recipe(tmp_path / "recipe.yaml", {"optimizer.lr": override})
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = "none"
    assert refusal.strip()


@examples(200)
@given(st.binary(max_size=60))
def test_any_bytes_load_or_are_refused(tmp_path, content):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"recipe\.yaml"):
        load_recipe(tmp_path / "recipe.yaml", {})
