"""A run whose DeepSpeed JSON says what was planned compares itself with it, once."""

import json
from types import SimpleNamespace

import pytest
import torch

from engine.run import planned
from engine.run.planned import COMPARED_AFTER, PlanCheck
from tests.engine.programs import prepare, zero
from tests.forks import run_python
from training.records import read_records


def checked(monkeypatch, plan, seconds, ranks=2, device="cpu"):
    """What each step of a launch finds whose steps take `seconds`."""
    now = iter([sum(seconds[: n + 1]) for n in range(len(seconds))])
    monkeypatch.setattr(planned.time, "perf_counter", lambda: next(now))
    mesh = SimpleNamespace(world_size=ranks)
    check = PlanCheck(SimpleNamespace(ds_config={"planned": plan}, mesh=mesh), torch.device(device))
    return [check.step_done() for _ in seconds]


def test_the_median_step_is_compared_after_twenty_steps(monkeypatch):
    """Neither the first, which set things up, nor a save between two steps counts."""
    seconds = [60.0, 9.0, 5.0, *[2.0] * (COMPARED_AFTER - 4), 30.0, *[7.0] * 3]
    found = checked(monkeypatch, {"ranks": 2, "step_seconds": 1.6, "rank_memory": 10**9}, seconds)
    assert [n for n, each in enumerate(found, 1) if each] == [COMPARED_AFTER]
    text = "a step takes 2 s, 25.0% above the 1.6 s that were planned"
    assert found[COMPARED_AFTER - 1] == {"planned_step_seconds": 1.6, "measured_step_seconds": 2.0, "text": text}


def test_memory_is_compared_where_it_is_a_devices_own(monkeypatch):
    monkeypatch.setattr(planned, "peak_memory_bytes", lambda device: 9 * 10**8)
    (*_, found) = checked(monkeypatch, {"ranks": 2, "rank_memory": 10**9}, [1.0] * COMPARED_AFTER, device="cuda")
    assert found.pop("text") == "this rank held 0.9 GB, 10.0% below the 1 GB planned"
    assert found == {"planned_rank_memory": 10**9, "measured_rank_memory": 9 * 10**8}


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_plan_for_other_ranks_says_nothing(monkeypatch, ranks):
    assert not any(checked(monkeypatch, {"ranks": 2, "step_seconds": 1.0}, [1.0] * 25, ranks=ranks))


def test_a_run_says_how_far_off_its_plan_was(tmp_path):
    recipe, data = prepare(tmp_path)
    file = tmp_path / "planned.json"
    file.write_text(json.dumps(zero(2, planned={"ranks": 1, "step_seconds": 0.5, "rank_memory": 10**9})))
    flags = ["--training.max_steps", "21", "--schedule.decay_steps", "null", "--schedule.schedule", "constant"]
    flags += ["--validation.every_steps", "null", "--checkpoint.every_steps", "100"]
    words = ["train.py", "--recipe", recipe, "--deepspeed_config", str(file), "--data", data]
    done = run_python([*words, "--output", str(tmp_path / "run"), *flags], timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "that were planned" in line]
    assert line.startswith("step 20/21 | plan ")
    (record,) = [each for each in read_records(tmp_path / "run/metrics.jsonl") if each.get("event") == "plan"]
    assert record["step"] == 20
    assert record["planned_step_seconds"] == 0.5
    assert 0 < record["measured_step_seconds"] < 60
    assert json.loads((tmp_path / "run/run.json").read_text())["ds_config"]["planned"]["ranks"] == 1

    file.write_text(json.dumps(zero(2, planned={"ranks": 1, "step_second": 0.5})))
    done = run_python([*words, "--output", str(tmp_path / "other")], timeout=200)
    assert done.returncode == 2
    assert "unknown key 'planned.step_second'; did you mean 'step_seconds'?" in done.stderr
