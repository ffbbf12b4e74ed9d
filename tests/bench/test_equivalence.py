"""`bench.equivalence` calls layouts the same when they are, and sees it when they are not."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench import equivalence
from tests.engine.programs import prepare
from tests.processes import run_cli, start_cli
from tests.tools.called import call

ZERO2 = "two ranks=ds_configs/zero2_fp32.json:2"


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> list[str]:
    recipe, data = prepare(tmp_path_factory.mktemp("equivalence"))
    return ["--recipe", recipe, "--data", data]


def compare(*arguments, temporary: Path) -> subprocess.CompletedProcess[str]:
    temporary.mkdir()
    done = run_cli([sys.executable, "-m", "bench.equivalence", *arguments], env={"TMPDIR": str(temporary)}, timeout=240)
    assert not list(temporary.glob("layouts-*"))
    return done


def rows(table: str) -> dict[str, list[str]]:
    lines = ([cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if line.startswith("│"))
    return {name: cells for name, *cells in lines}


def test_two_ranks_compute_what_one_does(setting, tmp_path):
    file = tmp_path / "figures.json"
    done = compare(*setting, "--steps", "2", "--layout", ZERO2, "--json", str(file), temporary=tmp_path / "tmp")
    assert done.returncode == 0, done.stdout + done.stderr
    table = rows(done.stdout)
    assert [cells[-1] for cells in table.values()] == ["reference", "same"]
    assert float(table["two ranks"][1]) <= 1e-5
    assert table["two ranks"][4] == "same"
    reference, two = json.loads(file.read_text())["layouts"]
    assert two["difference"]["loss"] == pytest.approx(float(table["two ranks"][1]), rel=0.1)
    assert [step["samples"] for step in two["steps"]] == [step["samples"] for step in reference["steps"]]
    assert len({step["samples"] for step in two["steps"]}) == 2
    assert two["wire_bytes"] > 0 == reference["wire_bytes"]
    assert two["tokens_per_second"] > 0
    assert two["memory_bytes"] > 10**8


def test_differences_refusals_and_failures_are_seen(setting, tmp_path):
    layouts = {
        "too strict": "too strict=ds_configs/zero2_fp32.json:2",
        "other seed": "other seed=ds_configs/zero0_fp32.json:1 --training.seed 4",
        "pipeline 3": "pipeline 3=ds_configs/pipeline_fp32.json:2 zero_optimization.stage=3",
        "other model": "other model=ds_configs/zero0_fp32.json:1 --model.num_hidden_layers 1",
    }
    flags = [word for text in layouts.values() for word in ("--layout", text)]
    done = compare(*setting, "--steps", "2", "--tolerance", "1e-15", *flags, temporary=tmp_path / "tmp")
    assert done.returncode == 1, done.stdout + done.stderr
    table = rows(done.stdout)
    verdicts = {name: cells[-1] for name, cells in table.items() if name in layouts}
    assert list(verdicts.values()) == ["differs", "differs", "refused", "failed"]
    assert [table[name][4] for name in ("too strict", "other seed")] == ["same", "OTHER"]
    assert (
        "refused: pipeline 3: ds_configs/pipeline_fp32.json: a pipeline with ZeRO stage 3 is impossible" in done.stdout
    )
    assert "failed: other model: has another model: it lacks layers.1" in done.stdout


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--layout", "zero2"], "--layout 'zero2' is not [NAME=]FILE.json:RANKS"),
        (["--layout", ZERO2, "--layout", ZERO2], "two layouts are called 'two ranks': give one of them another NAME="),
        (["--layout", ZERO2, "--steps", "9"], "--steps 9 goes beyond the recipe, which ends after 8 steps"),
        (["--reference", "ds_configs/none.json:1"], "ds_configs/none.json: no such DeepSpeed config"),
        (["--training.sed", "1"], "unknown flag --training.sed; did you mean --training.seed?"),
    ],
)
def test_bad_input_is_one_sentence(setting, capsys, monkeypatch, flags, sentence):
    done = call(equivalence.main, capsys, monkeypatch, *setting, *flags)
    assert (done.code, done.out) == (2, "")
    assert f"error: {sentence}" in done.err


def test_termination_leaves_nothing_behind(setting, tmp_path):
    words = [sys.executable, "-m", "bench.equivalence", *setting, "--steps", "2", "--layout", ZERO2]
    with start_cli(words, env={"TMPDIR": str(tmp_path)}) as running:
        running.wait_for(lambda: list(tmp_path.glob("layouts-*/0/log")))
        running.send_signal(signal.SIGTERM)
        assert running.finish().returncode == 130
        assert running.stderr.count("\n") == 1
        assert not list(tmp_path.glob("layouts-*"))
