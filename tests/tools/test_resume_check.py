"""`tools.resume_check` certifies a continuation in another layout, and no other one."""

import json
import sys

import pytest

from tests.engine.programs import prepare
from tests.processes import run_cli
from tests.tools.called import call
from tools import resume_check

FROM = ["--steps", "3", "--stop-at", "1", "--from", "ds_configs/zero1_fp32.json:1"]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    recipe, data = prepare(tmp_path_factory.mktemp("resume"))
    return ["--recipe", recipe, "--data", data]


def check(*arguments):
    return run_cli([sys.executable, "-m", "tools.resume_check", *arguments], timeout=240)


def test_another_layout_on_other_ranks_is_certified(setting, tmp_path):
    file = tmp_path / "figures.json"
    done = check(*setting, *FROM, "--to", "ds_configs/zero3_fp32.json:2", "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("certified\n")
    figures = json.loads(file.read_text())
    assert figures["certified"]
    samples = {name: [(step["step"], step["samples"]) for step in steps] for name, steps in figures["runs"].items()}
    assert samples["stopped"] + samples["resumed"] == samples["whole"]
    assert [number for number, _ in samples["whole"]] == [1, 2, 3]
    stopped, resumed = (part["difference"] for part in figures["parts"])
    assert (stopped["loss"], stopped["grad_norm"]) == (0.0, 0.0)
    assert 0 < resumed["weights"] < 1e-5


def test_other_rows_are_not_certified(setting):
    done = check(*setting, *FROM, "--to", "ds_configs/zero1_fp32.json:1 --training.global_batch_tokens 256")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "OTHER" in done.stdout
    assert "NOT certified" in done.stdout


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--to", "x"], "--to 'x' is not [NAME=]FILE.json:RANKS"),
        (["--to", "ds_configs/none.json:1"], "ds_configs/none.json: no such DeepSpeed config"),
        (["--to", "ds_configs/zero1.json:1", "--stop-at", "3"], "--stop-at must be at least 1 and less than --steps"),
        (["--to", "ds_configs/zero1.json:1", "--steps", "10"], "--steps 10 goes beyond the recipe"),
        (["--to", "ds_configs/zero1.json:3"], "ds_configs/zero1.json: a step of 8 samples"),
    ],
)
def test_bad_input_is_one_sentence(setting, capsys, monkeypatch, flags, sentence):
    done = call(resume_check.main, capsys, monkeypatch, *setting, *FROM, *flags)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: {sentence}")
