"""Recipe, JSON and data are checked against each other before anything starts."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from engine.run.plan import make_plan
from launch.topology import Topology
from model.config import ModelConfig
from model.hf.weights import save_hf
from model.llama import Llama
from tests.engine.programs import RECIPE, prepare
from tests.training.corpus import build

ALONE = Topology(0, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    recipe, data = prepare(folder)
    (folder / "ds.json").write_text('{"zero_optimization": {"stage": 2}}')
    return folder, recipe, data


def plan(setting, overrides=None, data=None, ds_config=None):
    folder, recipe, own_data = setting
    return make_plan(recipe, overrides or {}, str(ds_config or folder / "ds.json"), str(data or own_data), ALONE)


def refusal(setting, *args, **kwargs) -> list[str]:
    with pytest.raises(ValueError) as caught:
        plan(setting, *args, **kwargs)
    return str(caught.value).splitlines()


def test_limits_in_steps_and_in_tokens(setting):
    assert plan(setting).total_steps == 8
    tokens = {"training.max_steps": "null", "training.max_tokens": "5000"}
    assert plan(setting, tokens).total_steps == 10  # 512 tokens a step, rounded up


def test_problems_of_all_three_files_come_together(setting, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimisation": {}, "train_batch_size": 3}))
    changes = {
        "model.vocab_size": "100",
        "model.max_position_embeddings": "32",
        "training.global_batch_tokens": "100",
        "schedule.warmup_steps": "50",
    }
    text = "\n".join(refusal(setting, changes, ds_config=tmp_path / "ds.json"))
    for part in (
        "model.vocab_size is 100 but the tokenizer of",
        "model.max_position_embeddings is 32 but the rows of",
        "training.global_batch_tokens=100 is not a multiple of the data's sequence length 64: use 64 or 128",
        "did you mean 'zero_optimization'?",
        "train_batch_size is 3 but",
        "warmup (50 steps)",
    ):
        assert part in text


def test_json_keys_are_checked_even_when_the_recipe_is_broken(setting, tmp_path):
    (tmp_path / "ds.json").write_text('{"bf61": {}}')
    text = "\n".join(refusal(setting, {"optimizer.lr": "fast"}, tmp_path, tmp_path / "ds.json"))
    assert "--optimizer.lr" in text
    assert "did you mean 'bf16'?" in text
    assert "is not a prepared data set" in text


def test_validation_sets_must_exist_and_share_the_tokenizer(setting, tmp_path):
    other = tmp_path / "other"
    build(other, {"a": [50] * 20}, 64, vocab_size=256, splits=("train",))
    assert "no split 'validation'" in refusal(setting, {"validation.sets": f"{{x: {other}}}"})[0]
    assert "is not a prepared data set" in refusal(setting, {"validation.sets": f"{{x: {tmp_path}}}"})[0]
    (url,) = refusal(setting, {"validation.sets": "{x: s3://ours/data}"})
    assert "is a URL, where a folder of this machine is needed (`python -m tools.pull URL FOLDER`" in url
    assert "validation.sets is empty" in refusal(setting, {"validation.sets": "{}"}, data=other)[0]
    assert plan(setting, {"validation.every_steps": "null", "validation.sets": "{}"}, data=other).validation_sets == {}


def test_layouts_must_suit_the_model_the_rows_and_the_launch(setting, tmp_path):
    _, recipe, data = setting

    def sentences(config: dict, ranks: int, stages: int | None = None, **overrides: str) -> str:
        (tmp_path / "ds.json").write_text(json.dumps(config))
        topology = Topology(0, 0, ranks, torch.device("cpu"))
        with pytest.raises(ValueError) as caught:
            make_plan(recipe, overrides, str(tmp_path / "ds.json"), data, topology, {"pipeline": stages})
        return str(caught.value)

    pipeline = {"zero_optimization": {"stage": 1}, "pipeline": {"stages": "auto"}}
    assert "8 pipeline stages for 4 blocks: use at most 4 stages" in sentences(pipeline, 8)
    assert "a pipeline with ZeRO stage 0 clips by the gradients of the first stage alone" in sentences({}, 2, 2)
    pipeline["pipeline"]["stages"] = 4
    assert "pipeline.stages is 4 but --pipeline_stages is 2" in sentences(pipeline, 4, 2)
    by_tokens = {"training.global_batch_tokens": "768"}
    shared = {"sequence_parallel_size": 3}
    heads = "does not divide the model's 4 attention heads over 2 key/value heads: use 2 or 4, or "
    assert f'{heads}"sequence_parallel_exchange": "keys"' in sentences(shared, 3)
    by_keys = sentences(shared | {"sequence_parallel_exchange": "keys"}, 3, **by_tokens)
    assert "attention heads" not in by_keys
    assert "does not divide rows of 64 tokens" in by_keys
    assert "does not divide rows of 64 tokens" in sentences(shared, 3, **by_tokens)
    rows = {"tensor_parallel": {"autotp_size": 2, "split_rows": True}, "sequence_parallel_size": 64}
    assert "split_rows does not divide 1 tokens of a row over 2 ranks: set it to false" in sentences(rows, 128)
    both = {"tensor_parallel": {"autotp_size": 2}, "sequence_parallel_size": 4}
    assert "2 attention heads over 1 key/value heads of a tensor-parallel rank: use 2" in sentences(both, 8)


@pytest.mark.parametrize(("local_size", "said"), [(4, False), (2, False), (1, True)])
def test_a_tensor_group_across_hosts_is_named(setting, tmp_path, local_size, said):
    _, recipe, data = setting
    (tmp_path / "ds.json").write_text(json.dumps({"tensor_parallel": {"autotp_size": "auto"}}))
    topology = Topology(0, 0, 4, torch.device("cpu"), local_size)
    warnings = make_plan(recipe, {}, str(tmp_path / "ds.json"), data, topology, {"tensor": 2}).warnings
    assert (
        any("ds.json: tensor-parallel groups of 2 ranks lie across hosts, which have 1" in w for w in warnings) == said
    )


def test_settings_without_effect_are_named(setting):
    warnings = plan(setting, {"schedule.schedule": "cosine", "model.vocab_size": "300"}).warnings
    assert any("schedule.decay_steps has no effect" in warning for warning in warnings)
    assert any("44 entries more than the tokenizer" in warning for warning in warnings)
    assert not any("exported" in warning for warning in warnings)
    assert any("but not exported" in w for w in plan(setting, {"model.position_embedding": "learned"}).warnings)


def test_what_ranks_would_do_together_has_no_effect_alone(setting, tmp_path):
    config = {"sequence_parallel_exchange": "keys", "tensor_parallel": {"autotp_size": 1, "split_rows": True}}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    warnings = plan(setting, ds_config=tmp_path / "ds.json").warnings
    assert [w.split("ds.json: ")[1] for w in warnings] == [
        "sequence_parallel_exchange has no effect with sequence_parallel_size 1",
        "tensor_parallel.split_rows has no effect with autotp_size 1",
    ]


def test_the_choice_of_an_optimizers_implementation_has_no_effect(setting, tmp_path):
    block = {"type": "AdamW", "legacy_fusion": True, "params": {"lr": "auto", "torch_adam": True}}
    (tmp_path / "ds.json").write_text(json.dumps({"optimizer": block}))
    (fusion, implementation) = plan(setting, ds_config=tmp_path / "ds.json").warnings
    assert "ds.json: optimizer.legacy_fusion has no effect" in fusion
    assert "ds.json: optimizer.params.torch_adam has no effect" in implementation


def test_initial_weights_must_fit(setting, tmp_path):
    config = ModelConfig(**RECIPE["model"] | {"hidden_size": 64})
    save_hf(config, Llama(config).state_dict().items(), tmp_path / "hf")
    lines = refusal(setting, {"training.initial_weights": str(tmp_path / "hf")})
    assert lines[0].endswith("has hidden_size 64 but the recipe's model.hidden_size is 32")
    absent = refusal(setting, {"training.initial_weights": str(tmp_path / "absent")})[0]
    assert "absent is neither a Hugging Face folder (no config.json) nor a run" in absent
    fitting = {"training.initial_weights": str(tmp_path / "hf"), "model.hidden_size": "64"}
    assert plan(setting, fitting).recipe.model.hidden_size == 64


def test_recipe_of_a_plan_is_what_was_written(setting):
    written = yaml.safe_load(Path(setting[1]).read_text())
    assert plan(setting).recipe.model_dump(exclude_unset=True, mode="json") == written


def test_a_validation_set_of_one_row_is_a_notice(setting, monkeypatch):
    rows = len(plan(setting, {"validation.every_steps": "1"}).validation_sets["validation"])
    monkeypatch.setattr("engine.run.plan.FEW_ROWS", rows + 1)
    said = [warning for warning in plan(setting, {"validation.every_steps": "1"}).warnings if "is noise" in warning]
    assert f"validation set validation has {rows} row" in said[0]
