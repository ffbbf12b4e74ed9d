"""`tools.plan` answers for every recipe, and what it writes is a run that compares itself with the plan."""

import json
import re
from pathlib import Path

import pytest
import yaml

from engine.run.plan import make_plan
from planner.hardware import find_hardware
from planner.stand_in import write_stand_in
from tests.processes import ROOT, run_cli
from tests.tools.called import call
from tools.plan import main
from training.config import load_recipe

RECIPES = sorted(file.name for file in (ROOT / "recipes").glob("*.yaml"))
WHERE = {
    "llama-70b.yaml": "h200x64",
    "llama-8b.yaml": "h100x64",
    "llama-7b.yaml": "a100x32",
    "tiny-search.yaml": "h100x2",
}
"""The others fit one device, or eight."""


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_an_answer(name, capsys, monkeypatch):
    hardware = WHERE.get(name, "h100" if name.startswith("tiny") else "h100x8")
    config, file = ROOT / "ds_configs/zero3.json", str(ROOT / "recipes" / name)
    words = ["--seq_length", 512, "--hardware", hardware, "--deepspeed_config", config, "--price", 2, "--json"]
    answer = call(main, capsys, monkeypatch, "--recipe", file, *words)
    assert answer.code == 0, answer.err
    facts = json.loads(answer.out)
    (first,) = facts["fits"]
    recipe, devices = load_recipe(file, {}), find_hardware(hardware).devices
    assert facts["parameters"] == recipe.model.num_parameters()
    assert facts["tokens"] == facts["steps"] * recipe.training.global_batch_tokens
    assert 0 < first["rank_memory"]["peak"] < facts["hardware"]["device"]["memory"]
    assert first["device_hours"] == pytest.approx(first["step_seconds"] * facts["steps"] / 3600 * devices)
    assert first["price"] == pytest.approx(2 * first["device_hours"])
    assert 0 <= first["activation_checkpointing"] <= recipe.model.num_hidden_layers


def test_no_other_number_of_rows_is_faster_than_the_answer(tmp_path, capsys, monkeypatch):
    """Neither the fewest recomputed blocks nor the most rows need be: each more means fewer of the other."""
    config = json.loads((ROOT / "ds_configs/zero3.json").read_text())
    seconds = {}
    for rows in ("auto", 1, 2, 4, 8):
        (tmp_path / "ds.json").write_text(json.dumps(config | {"train_micro_batch_size_per_gpu": rows}))
        words = ["--recipe", ROOT / "recipes/llama-8b.yaml", "--seq_length", 8192, "--hardware", "h100x64", "--json"]
        answer = call(main, capsys, monkeypatch, *words, "--deepspeed_config", tmp_path / "ds.json")
        (first,) = json.loads(answer.out)["fits"]
        seconds[rows] = first["step_seconds"]
    assert seconds.pop("auto") == pytest.approx(min(seconds.values()))


def test_the_readme_shows_what_is_printed(capsys, monkeypatch):
    readme = (ROOT / "README.md").read_text()
    command, shown = re.search(r"```\n\$ python -m tools\.plan (.*?)\n(.*?)```", readme, re.DOTALL).groups()
    monkeypatch.chdir(ROOT)
    assert call(main, capsys, monkeypatch, *command.split()).out.split() == shown.split()


def test_the_best_of_all_is_written_as_a_run_takes_it(tmp_path, capsys, monkeypatch):
    recipe, output = str(ROOT / "recipes/tiny.yaml"), tmp_path / "best.json"
    words = ["--recipe", recipe, "--seq_length", 128, "--hardware", "h100x4", "--tensor", 2]
    answer = call(main, capsys, monkeypatch, *words, "--output", output, "--json")
    assert answer.code == 0, answer.err
    facts = json.loads(answer.out)
    assert [one["step_seconds"] for one in facts["fits"]] == sorted(one["step_seconds"] for one in facts["fits"])
    everything = {Path(one["deepspeed_config"]).name for one in (*facts["fits"], *facts["left_out"])}
    assert everything == {file.name for file in (ROOT / "ds_configs").glob("*.json")}
    assert all(one["reason"] for one in facts["left_out"])
    best, config = facts["fits"][0], json.loads(output.read_text())
    assert config["planned"] == {
        "ranks": 4,
        "rank_memory": best["rank_memory"]["peak"],
        "step_seconds": best["step_seconds"],
    }
    write_stand_in(tmp_path / "data", load_recipe(recipe, {}), 128)
    overrides = {"validation.every_steps": "null", "validation.sets": "{}"}
    topology = find_hardware("h100x4").topology()
    found = make_plan(recipe, overrides, str(output), str(tmp_path / "data"), topology)
    assert str(found.mesh) == best["layout"]
    assert found.batch.micro_batch_samples == best["micro_batch_samples"]


def test_what_cannot_be_is_said(tmp_path, capsys, monkeypatch):
    words = ["--recipe", ROOT / "recipes/llama-70b.yaml", "--deepspeed_config", ROOT / "ds_configs/zero1.json"]
    short = call(main, capsys, monkeypatch, *words, "--hardware", "h100x8", "--seq_length", 4096)
    assert short.code == 2
    assert "weights, gradients and optimizer states alone take" in short.out
    assert short.err.endswith("error: nothing fits on h100x8: take more or larger devices, or shorter rows\n")
    for more, sentence in (
        (["--hardware", "h100x8"], "give either --data, or --seq_length before the data are built"),
        (["--hardware", "h10x8", "--seq_length", 512], "no such device; did you mean 'h100'?"),
        (["--hardware", "h100x8", "--seq_length", 512, 1024], "give one, or one for each of the 1 stages"),
    ):
        refused = call(main, capsys, monkeypatch, *words, *more)
        assert refused.code == 2
        assert sentence in refused.err
        assert refused.out == ""
    words = ["--recipe", ROOT / "recipes/tiny-long.yaml", "--hardware", "h100x64", "--seq_length", 4096]
    refused = call(main, capsys, monkeypatch, *words)
    assert "model.max_position_embeddings is 2048 but the rows" in refused.err, "what no JSON can mend"
    assert ".json" not in refused.err


LLAMA_405B = {
    "model": {
        "vocab_size": 128256,
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    "training": {"global_batch_tokens": 2**24, "max_tokens": 15 * 10**12},
    "optimizer": {"lr": 8e-5},
    "schedule": {"warmup_steps": 8000},
    "validation": {"every_steps": None},
}
"""The model of The Llama 3 Herd of Models (Meta 2024), table 3, and the batch of most of its training, section 3.4.1."""


LOOK = """
import sys
import torch
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
alone = peak()
from tools.plan import main
main()
heavy = {"torch._dynamo", "torch._inductor", "triton"} & sys.modules.keys()
print(*heavy, peak() - alone, file=sys.stderr)
"""


def test_405b_on_16384_devices(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(LLAMA_405B))
    words = ["--recipe", tmp_path / "recipe.yaml", "--seq_length", 8192, "--hardware", "h100x16384", "--json"]
    words += ["--deepspeed_config", ROOT / "ds_configs/3d_zero1.json"]
    answer = run_cli(["python", "-c", LOOK, *map(str, words)])
    assert answer.returncode == 0, answer.stderr
    more = int(answer.stderr.splitlines()[-1]) * 1024  # fails with a name before it, where torch's compiler was loaded
    assert more < 250e6, "500 MB with torch itself, whose build for CPUs takes 242, that for GPUs 528"
    facts = json.loads(answer.stdout)
    assert facts["parameters"] == pytest.approx(405e9, rel=0.01)
    best = facts["fits"][0]
    assert best["rank_memory"]["peak"] < facts["hardware"]["device"]["memory"]
    # fp32 copy and moments, divided by all ranks, beside bf16 weights and gradients of a pipeline's and tensor's part
    parts = best["degrees"].get("pipeline", 1) * best["degrees"].get("tensor", 1)
    assert best["rank_memory"]["peak"] > 405e9 * (2 / parts + 12 / 16384)
    assert facts["left_out"]
