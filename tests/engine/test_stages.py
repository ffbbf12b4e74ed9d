"""Stages of a run: planned with all mistakes at once, and in every layout the same steps as without a stop."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from engine.checkpoint.manifest import unseal
from engine.run.plan import make_plan
from engine.run.resume import check_resumable
from launch.topology import Topology
from model.config import ModelConfig
from storage.documents import write_manifest
from tests.engine.kept import kept
from tests.engine.programs import flat, moved_at, prepare, stopped, zero
from tests.forks import run_python, start_python
from tests.training.corpus import build
from tools.hf_tokenizer import Written
from tools.model_card import card
from training.records import read_records

STEPS, STOPS = 8, (3, 4)  # at the border of the first two stages, and inside the second
CUT = {"training.micro_batch_samples": "4"}
CONFIGS = {
    "zero0": (zero(0), CUT),
    "zero1-offload": (zero(1, zero={"offload_optimizer": {"device": "cpu"}}), CUT),
    "zero2": (zero(2), CUT),
    "zero3": (zero(3), CUT | {"data.num_workers": "1", "data.prefetch_batches": "8"}),
    "pipeline": (zero(1, pipeline={"stages": "auto"}), CUT),
}
ON_TWO = CONFIGS | {
    "tensor2": (zero(1, tensor_parallel={"autotp_size": 2}), CUT),
    "sequence2": (zero(2, sequence_parallel_size=2), CUT),
    "compressed": (zero(0, gradient_compression={"method": "powersgd", "warmup_steps": 1, "min_elements": 64}), CUT),
}
EQUAL = [name for name in ON_TWO if name != "compressed"]
MOVES_TO_TWO = [("zero3", "pipeline"), ("pipeline", "sequence2")]
MOVES_TO_ONE = [("zero3", "zero0"), ("pipeline", "zero2"), ("zero1-offload", "zero1-offload")]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Rows of 64, then of 128 tokens, then the latter in another mixture."""
    folder = tmp_path_factory.mktemp("stages")
    recipe, data = prepare(folder, blocks=2)
    rng = np.random.default_rng(1)
    lengths = {"long": rng.integers(40, 300, 40).tolist(), "short": rng.integers(4, 60, 60).tolist()}
    build(folder / "long", lengths, 128, vocab_size=256, splits=("train", "validation"))
    tree = yaml.safe_load(Path(recipe).read_text())
    tree["model"]["max_position_embeddings"] = 128
    tree["stages"] = [
        {"name": "short", "max_steps": 3},
        {"name": "long", "max_steps": 3, "data": str(folder / "long"), "micro_batch_samples": 1},
        {"name": "anneal", "max_tokens": 1024, "data": str(folder / "long"), "weights": {"long": 1.0, "short": 3.0}},
    ]
    Path(recipe).write_text(yaml.safe_dump(tree))
    return str(folder), recipe, data


@pytest.fixture(scope="module")
def runs(setting, on_ranks):
    """By name, on 2 ranks: 8 steps at once, and in three launches; what each rank reports."""

    @kept
    def run(name: str) -> list[dict]:
        return [rank[name] for rank in on_ranks(2, stopped, *setting, {name: ON_TWO[name]}, STEPS, STOPS)]

    return run


@pytest.fixture(scope="module")
def uncut(setting, on_ranks):
    """One process that takes every step as a single micro-batch, and so has nothing to accumulate."""
    layout = {"uncut": (zero(0), {"training.micro_batch_samples": "8", "stages": uncut_stages(setting)})}
    return on_ranks(1, stopped, *setting, layout, STEPS, ())[0]["uncut"]


def uncut_stages(setting) -> str:
    stages = yaml.safe_load(Path(setting[1]).read_text())["stages"]
    return json.dumps(
        [{key: value for key, value in stage.items() if key != "micro_batch_samples"} for stage in stages]
    )


def values(history) -> np.ndarray:
    return np.array([(step["loss"], step["objective"], step["grad_norm"]) for step in history])


def rows(ranks: list[list[dict]], name: str) -> list:
    takers = ranks[:1] if name in ("pipeline", "tensor2", "sequence2") else ranks
    return [sorted(row for rank in takers for row in rank[i]["rows"]) for i in range(len(takers[0]))]


@pytest.mark.parametrize("name", ON_TWO)
def test_stopped_at_a_border_and_inside_a_stage_is_exact_to_the_bit(runs, name):
    for result in runs(name):
        assert [step["step"] for step in result["history"]] == list(range(1, STEPS + 1))
        np.testing.assert_array_equal(values(result["history"]), values(result["whole"]))
        assert [step["rows"] for step in result["history"]] == [step["rows"] for step in result["whole"]]
        assert result["state"]["stage_samples"] == [3 * 8, 3 * 4]
        assert result["state"]["consumed_samples"] == 3 * 8 + 3 * 4 + 2 * 4
        assert result["state"]["consumed_tokens"] == STEPS * 512


@pytest.mark.parametrize("name", EQUAL)
def test_every_layout_computes_the_same_through_all_stages(runs, uncut, name):
    two = runs(name)
    np.testing.assert_allclose(values(two[0]["whole"]), values(uncut["whole"]), rtol=1e-5)
    assert rows([rank["whole"] for rank in two], name) == rows([uncut["whole"]], "")
    for rank in two:
        for key, value in rank["weights"].items():
            np.testing.assert_allclose(value, uncut["weights"][key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", EQUAL)
def test_validation_sets_of_all_stages_in_every_layout(runs, uncut, name):
    assert list(uncut["validation"]) == ["validation", "validation_long", "again"]
    for key, scores in uncut["validation"].items():
        assert flat(runs(name)[0]["validation"][key]) == pytest.approx(flat(scores), rel=1e-5)
    assert uncut["validation"]["validation"] != uncut["validation"]["validation_long"]


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("move", [*((2, *m) for m in MOVES_TO_TWO), *((1, *m) for m in MOVES_TO_ONE)], ids=str)
def test_another_layout_continues_the_same_stages(setting, runs, on_ranks, move, stop):
    ranks, source, target = move
    whole = [rank["whole"][stop:] for rank in runs(source)]
    moved = on_ranks(ranks, moved_at, *setting, [(source, target)], ON_TWO, STEPS, (stop,))
    went = [rank[source, target, stop] for rank in moved]
    np.testing.assert_allclose(values(went[0]), values(whole[0]), rtol=1e-5)
    assert rows(went, target) == rows(whole, source)


def test_the_command_says_where_a_stage_begins_and_survives_a_kill(setting, uncut, tmp_path):
    """train.py itself, killed inside the second stage and continued."""
    folder, recipe, data = setting
    files = ["--recipe", recipe, "--deepspeed_config", "ds_configs/zero2_fp32.json", "--data", data]
    command = ["train.py", *files, "--output", str(tmp_path), "--checkpoint.every_steps", "1"]
    with start_python(command) as running:
        running.wait_for(lambda: (tmp_path / "checkpoints/step-00000004").is_dir(), timeout=120)
        running.kill_all(signal.SIGKILL)
    done = run_python(command, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    records = read_records(tmp_path / "metrics.jsonl")
    steps = {record["step"]: record for record in records if "loss" in record}
    losses = [steps[number]["loss"] for number in range(1, STEPS + 1)]
    np.testing.assert_allclose(losses, values(uncut["whole"])[:, 0], rtol=1e-5)
    assert steps[STEPS]["samples"] == 3 * 8 + 5 * 4
    assert steps[STEPS]["tokens"] == STEPS * 512
    begun = [(r["step"], r["name"], r["seq_length"], r["data"]) for r in records if r.get("event") == "stage"]
    assert begun[:2] == [(0, "short", 64, data), (3, "long", 128, f"{folder}/long")]
    assert begun[-1] == (6, "anneal", 128, f"{folder}/long")
    assert f"step 6/8 | stage name=anneal seq_length=128 data={folder}/long" in done.stdout
    stages = json.loads((tmp_path / "run.json").read_text())["data"]["stages"]
    assert [stage["name"] for stage in stages] == ["short", "long", "anneal"]


# ---------------------------------------------------------------------------------------------------------------------
# The plan


def plan(setting, stages=None, ranks: int = 1, config: dict | None = None, **overrides):
    folder, recipe, data = setting
    file = Path(folder) / "ds.json"
    file.write_text(json.dumps(config or zero(2)))
    overrides = {key.replace("__", "."): value for key, value in overrides.items()}
    overrides |= {"stages": json.dumps(stages)} if stages is not None else {}
    return make_plan(recipe, overrides, str(file), data, Topology(0, 0, ranks, torch.device("cpu")))


def refusal(*args, **kwargs) -> list[str]:
    with pytest.raises(ValueError) as caught:
        plan(*args, **kwargs)
    return str(caught.value).splitlines()


def test_a_stage_is_cut_as_the_first_in_tokens(setting):
    folder = setting[0]
    long = {"data": f"{folder}/long"}
    stages = [{"max_steps": 3}, {"max_steps": 3, **long}, {"max_steps": 2, **long, "micro_batch_samples": 4}]
    planned = plan(setting, stages, training__micro_batch_samples="4")
    assert [tuple(stage.batch) for stage in planned.stages] == [(8, 4, 2), (4, 2, 2), (4, 4, 1)]
    assert [(stage.begin, stage.end, stage.seq_length) for stage in planned.stages] == [
        (0, 3, 64),
        (3, 6, 128),
        (6, 8, 128),
    ]
    assert [planned.stage_of(step).name for step in (1, 3, 4, 6, 7, 8)] == [f"stage-{n}" for n in (1, 1, 2, 2, 3, 3)]
    assert planned.total_steps == 8
    smallest = plan(setting, [*stages[:2], {"max_steps": 2, **long}], training__micro_batch_samples="1")
    assert [tuple(stage.batch) for stage in smallest.stages] == [(8, 1, 8), (4, 1, 4), (4, 1, 4)]
    first = [{"max_steps": 8, "micro_batch_samples": 8}]
    assert plan(setting, first).batch == (8, 8, 1)
    (sentence,) = refusal(setting, first, config=zero(2) | {"train_micro_batch_size_per_gpu": 4})
    assert "train_micro_batch_size_per_gpu is 4 but the recipe's stages.0.micro_batch_samples is 8" in sentence


def test_a_recipe_without_stages_is_one_stage(setting):
    planned = plan(setting, [])
    (stage,) = planned.stages
    assert (stage.begin, stage.end, stage.data, stage.config) == (0, 8, setting[2], planned.recipe.data)
    assert (planned.batch, planned.dataset) == (stage.batch, stage.dataset)


def test_problems_of_all_stages_come_together(setting, tmp_path):
    folder, _, data = setting
    manifest = build(tmp_path / "foreign", {"a": [50] * 20}, 48, vocab_size=256)
    tokenizer = manifest.tokenizer.model_copy(update={"sha256": "1" * 64})
    write_manifest(tmp_path / "foreign", manifest.model_copy(update={"tokenizer": tokenizer}))
    stages = [
        {"max_steps": 3, "weights": {"long": 1.0, "nobody": 1.0}},
        {"name": "far", "max_steps": 3, "data": f"{folder}/long", "micro_batch_samples": 3},
        {"max_steps": 2, "data": str(tmp_path / "foreign")},
    ]
    text = "\n".join(refusal(setting, stages, model__max_position_embeddings="64"))
    for sentence in (
        "recipe.yaml: stages: stage-1: weight for unknown source 'nobody': the data has long, short",
        "stages: far: micro_batch_samples 3 does not divide the 4 rows that each data-parallel rank has of a step",
        f"model.max_position_embeddings is 64 but the rows of {folder}/long have 128 tokens",
        "stages: stage-3: training.global_batch_tokens=512 is not a multiple of the 48 tokens of a row of",
        ": use 384 or 768, which suit every stage",
        f"stages: stage-3: {tmp_path}/foreign was built with another tokenizer than {data}",
    ):
        assert sentence in text
    for place, words in ((str(tmp_path), "is not a prepared data set"), ("s3://ours/data", "is a URL, where")):
        (absent,) = refusal(setting, [{"max_steps": 8, "data": place}])
        assert words in absent
    eight = [{"max_steps": 6}, {"max_steps": 2, "data": f"{folder}/long"}]
    assert "stages: stage-2: a step of 4 rows cannot be shared evenly by 8 data-parallel ranks" in "\n".join(
        refusal(setting, eight, ranks=8, training__micro_batch_samples="1")
    )
    assert "training.max_steps makes 8 steps but the stages add up to 2" in refusal(setting, [{"max_steps": 2}])[0]


def test_a_later_stage_may_not_accumulate_in_bf16(setting):
    stages = [{"max_steps": 6, "micro_batch_samples": 8}, {"max_steps": 2, "micro_batch_samples": 4}]
    (sentence,) = refusal(setting, stages, config=zero(2) | {"bf16": {"enabled": True}})
    assert "bf16 gradients would be accumulated over micro-batches in bf16" in sentence


def test_layouts_must_suit_the_rows_of_every_stage(setting, tmp_path):
    build(tmp_path / "odd", {"a": [300] * 20}, 32, vocab_size=256)
    build(tmp_path / "odder", {"a": [300] * 20}, 1, vocab_size=256)
    shared = {"ranks": 2, "config": zero(2, sequence_parallel_size=2)}
    fitting = [{"max_steps": 6}, {"max_steps": 2, "data": str(tmp_path / "odd")}]
    assert plan(setting, fitting, **shared, training__micro_batch_samples="2").stages[1].batch == (16, 4, 4)
    odd = [{"max_steps": 6}, {"max_steps": 2, "data": str(tmp_path / "odder")}]
    assert any("does not divide rows of 1 tokens" in line for line in refusal(setting, odd, **shared))


# ---------------------------------------------------------------------------------------------------------------------
# What may change between two launches


@pytest.fixture
def run(setting, runs, tmp_path):
    """A run stopped inside the second stage: all that is read of it is its manifest."""
    runs("zero3")
    (tmp_path / "checkpoints/step-00000004").mkdir(parents=True)
    manifest = Path(setting[0]) / "stopped-4/zero3/checkpoints/step-00000004/manifest.json"
    (tmp_path / "checkpoints/step-00000004/manifest.json").write_text(manifest.read_text())
    return tmp_path


def stages_of(setting) -> list[dict]:
    return yaml.safe_load(Path(setting[1]).read_text())["stages"]


def resumable(run, *args, allow_data_change=False, **kwargs) -> list[str]:
    kwargs = {"training__max_steps": "null"} | kwargs
    return check_resumable(run, plan(*args, **kwargs), allow_data_change)


def test_the_record_names_every_stage(setting, run):
    manifest = unseal((run / "checkpoints/step-00000004/manifest.json").read_bytes())
    stages = manifest.data["stages"]
    assert [(s["name"], s["first_step"], s["last_step"], s["seq_length"]) for s in stages] == [
        ("short", 1, 3, 64),
        ("long", 4, 6, 128),
        ("anneal", 7, 8, 128),
    ]
    assert stages[1]["path"] == f"{setting[0]}/long"
    assert len({stage["fingerprint"] for stage in stages}) == 2
    assert manifest.data["fingerprint"] == stages[0]["fingerprint"]
    assert manifest.state.data_fingerprint == stages[1]["fingerprint"]
    assert stages[2]["weights"] == {"long": 1.0, "short": 3.0}
    assert all(stage["tokenizer"]["sha256"] == "0" * 64 for stage in stages)
    written = Written(None, adds_bos=False, own_code=False)
    text = card(run, run / "checkpoints/step-00000004", manifest, ModelConfig(**manifest.recipe["model"]), run, written)
    assert "Rows held 64, then 128 tokens" in text
    assert f"Fingerprint `{stages[0]['fingerprint']}`, then `{stages[1]['fingerprint']}`" in text
    assert [line.split("|")[5].strip() for line in text.splitlines() if line.startswith("| long |")] == ["64", "128"]


def test_what_is_to_come_may_change_and_is_said(setting, run):
    same = stages_of(setting)
    assert not any("stages" in line for line in resumable(run, setting))
    assert resumable(run, setting, [{**same[0], "name": "a"}, {**same[1], "micro_batch_samples": 4}, same[2]])
    longer = [same[0], {**same[1], "max_steps": 9}, same[2]]
    assert "stages changed; after step 4 come: long to step 12 on" in "\n".join(resumable(run, setting, longer))
    now = [same[0], {**same[1], "max_steps": 1}, same[2]]  # go over to the next stage at once
    assert "after step 4 come: anneal to step 6 on" in "\n".join(resumable(run, setting, now))
    other = [*same[:2], {**same[2], "weights": {"long": 5.0, "short": 1.0}}, {"max_steps": 2}]
    assert "stage-4 to step 10 on" in "\n".join(resumable(run, setting, other))


def test_what_was_trained_may_not_change(setting, run):
    same = stages_of(setting)
    data = setting[2]
    for stages, sentence in (
        (
            [{**same[0], "max_steps": 2}, *same[1:]],
            "until step 4 stages began at steps [1, 4], in the recipe they begin at",
        ),
        ([{**same[0], "max_steps": 9}, *same[1:]], "at steps [1, 4], in the recipe they begin at steps [1]"),
        ([{**same[0], "weights": {"long": 1.0, "short": 1.0}}, *same[1:]], "stages: short: weights was None"),
        ([same[0], {**same[1], "data": data}, same[2]], "stages: long: the data set is another one"),
    ):
        with pytest.raises(ValueError, match="cannot be continued") as caught:
            resumable(run, setting, stages)
        assert sentence in str(caught.value)
    with pytest.raises(ValueError, match="began at steps"):
        resumable(run, setting, [{**same[0], "max_steps": 2}, *same[1:]], allow_data_change=True)
    assert resumable(run, setting, [same[0], {**same[1], "data": data}, same[2]], allow_data_change=True)
    with pytest.raises(ValueError, match="began at steps"):
        resumable(run, setting, [], training__max_steps="8")


def test_a_run_from_before_there_were_stages_may_get_some(setting, run):
    file = run / "checkpoints/step-00000004/manifest.json"
    tree = json.loads(file.read_text())
    del tree["digest"]
    tree["format_version"] = 1
    first = tree["data"]["stages"][0]["fingerprint"]
    del tree["data"]["stages"], tree["recipe"]["stages"], tree["state"]["stage_samples"], tree["state"]["batches"]
    tree["recipe"]["training"]["max_steps"] = 8
    tree["state"]["data_fingerprint"] = first
    tree["recipe"]["model"]["max_position_embeddings"] = 64
    file.write_text(json.dumps(tree))
    long = {"name": "long", "max_steps": 3, "data": f"{setting[0]}/long"}
    assert resumable(run, setting, [{"max_steps": 6}, long])
    assert resumable(run, setting, [{"max_steps": 4}, long])
    with pytest.raises(ValueError, match=r"began at steps \[1\], in the recipe they begin at steps \[1, 4\]"):
        resumable(run, setting, [{"max_steps": 3}, long])
    with pytest.raises(ValueError, match=r"model.max_position_embeddings was 64"):
        resumable(run, setting, [{"max_steps": 6}, long], model__rope_scaling="{rope_type: linear, factor: 2.0}")
