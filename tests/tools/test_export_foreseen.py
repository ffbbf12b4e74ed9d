"""What an export will be like is said before a training; the texts that it promises to read are those trained on."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
import yaml

from data_prep.repack import repack
from engine.checkpoint.manifest import CheckpointManifest
from engine.run.plan import RunPlan, make_plan
from launch.topology import Topology
from storage.manifest import PackingPolicy, read_manifest
from tests.data_prep.texts import PROSE
from tests.tools.trained import RECIPE, build_data, write_documents
from tools.export import exported_config

SHORT, LONG, RECIPE_LENGTH = 48, 96, 128
STAGES = [{"name": "short", "max_steps": 2}, {"name": "long", "max_steps": 2}]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("documents")
    return f"documents={write_documents(folder / 'documents.jsonl', PROSE[:40])}"


@pytest.fixture(scope="module")
def lengths(source, tokenizer, tmp_path_factory) -> dict[int, Path]:
    """Data sets with rows of both lengths."""
    folder = tmp_path_factory.mktemp("lengths")
    return {
        length: build_data([source], tokenizer, folder / str(length), length, validation_fraction=0)
        for length in (SHORT, LONG)
    }


def plan_of(folder: Path, data: Path, **sections) -> RunPlan:
    recipe = {key: dict(value) for key, value in RECIPE.items() if key != "validation"}
    for name, keys in sections.items():
        recipe[name] = recipe[name] | keys if isinstance(keys, dict) else keys
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "ds.json").write_text("{}")
    alone = Topology(0, 0, 1, torch.device("cpu"))
    return make_plan(str(folder / "recipe.yaml"), {}, str(folder / "ds.json"), str(data), alone)


def exported_at(plan: RunPlan, step: int) -> tuple[int, int]:
    """What the config and the tokenizer of an export promise, from what a checkpoint holds."""
    data = plan.stages[0].describe_data() | {"stages": [stage.describe() for stage in plan.stages]}
    content = json.loads(json.dumps({"recipe": plan.recipe.model_dump(mode="json"), "data": data}))
    config, context = exported_config(CheckpointManifest.model_construct(**content, state=SimpleNamespace(step=step)))
    return config.max_position_embeddings, context


def test_the_export_promises_the_longest_rows_trained_on(lengths, tmp_path, capsys):
    assert exported_at(plan_of(tmp_path, lengths[SHORT]), 1) == (SHORT, SHORT)
    assert f"max_position_embeddings is {SHORT}, the tokens of a row in training, not the" in capsys.readouterr().err
    stages = [STAGES[0], STAGES[1] | {"data": str(lengths[LONG])}]
    staged = plan_of(tmp_path, lengths[SHORT], stages=stages, training={"max_steps": None})
    assert [exported_at(staged, step) for step in (2, 3)] == [(SHORT, SHORT), (LONG, LONG)]
    back = plan_of(
        tmp_path,
        lengths[LONG],
        stages=[STAGES[1], STAGES[0] | {"data": str(lengths[SHORT])}],
        training={"max_steps": None},
    )
    assert exported_at(back, 4) == (LONG, LONG)
    capsys.readouterr()
    assert exported_at(plan_of(tmp_path, lengths[LONG], model={"max_position_embeddings": LONG}), 1) == (LONG, LONG)
    assert capsys.readouterr().err == ""


def test_positions_made_for_longer_texts_stay_and_that_is_said(lengths, tmp_path, capsys):
    scaling = {"rope_type": "linear", "factor": 2.0}
    scaled = plan_of(tmp_path, lengths[SHORT], model={"rope_scaling": scaling})
    assert exported_at(scaled, 1) == (RECIPE_LENGTH, RECIPE_LENGTH)
    words = f"max_position_embeddings is the recipe's {RECIPE_LENGTH}; the rows of this training held {SHORT} tokens\n"
    assert capsys.readouterr().err == words
    begun = scaled.recipe.model_dump(mode="json") | {"model": RECIPE["model"]}
    begun["training"] = begun["training"] | {"initial_weights": "somewhere"}
    manifest = CheckpointManifest.model_construct(
        recipe=begun, data={"seq_length": SHORT}, state=SimpleNamespace(step=1)
    )
    assert exported_config(manifest)[1] == RECIPE_LENGTH
    assert capsys.readouterr().err == words


def test_a_tokenizer_that_transformers_lacks_is_said_before_the_work(source, tokenizer, lengths, tmp_path, capsys):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE[:40]), model_writer=model, model_type="unigram", vocab_size=300, minloglevel=2
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    (tmp_path / "tokenizer.json").write_text("{}")  # that it has a broken one beside it changes nothing
    capsys.readouterr()
    data = build_data([source], tmp_path / "tokenizer.model", tmp_path / "data", SHORT, validation_fraction=0)
    said = capsys.readouterr().err.splitlines()
    wanted = f"{tmp_path}/tokenizer.model has no exact equivalent in transformers (it is not a BPE model): "
    assert [line for line in said if line.startswith(wanted) and "trust_remote_code=True" in line] == said[:1]
    (warning,) = [line for line in plan_of(tmp_path, data).warnings if "transformers" in line]
    assert warning.startswith(f"{data}: the tokenizer has no exact equivalent in transformers (it is not a BPE model)")
    again = repack(data, PackingPolicy(seq_length=SHORT // 2), tmp_path / "again")
    assert again.statistics["tokenizer_needs_own_code"] == "it is not a BPE model"
    plan = plan_of(tmp_path, lengths[SHORT])
    assert "tokenizer_needs_own_code" not in read_manifest(lengths[SHORT]).statistics
    assert not [line for line in plan.warnings if "trust_remote_code" in line]
