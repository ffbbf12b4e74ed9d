"""Where the time of a real run went, over a kill: it adds up to what a clock outside says, and the steps done again are known."""

import time

import pytest

from engine.checkpoint.manifest import step_of, steps
from tests.engine.programs import prepare
from tests.forks import run_python
from tests.processes import free_port, start_cli
from tools.report import page
from tools.run_history import read_run
from training.goodput import GOODPUT_FILE, read_times
from training.records import read_records

LONG = ["--training.max_steps", "100000", "--schedule.decay_steps", "null"]
MORE_STEPS = 20
LAST_LINE = "| goodput of "


def test_a_killed_and_continued_run_is_accounted_for(tmp_path):
    run, (recipe, data) = tmp_path / "run", prepare(tmp_path)
    flags = ["train.py", "--recipe", recipe, "--deepspeed_config", "ds_configs/zero2_fp32.json", "--data", data]
    flags += ["--output", str(run), "--validation.every_steps", "10", "--checkpoint.every_steps", "30"]

    def launch(*more: str):
        return start_cli(["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), *flags, *more])

    def is_ahead() -> bool:
        """Of its newest checkpoint, and has said so."""
        times = read_times(run)
        return times is not None and bool(steps(run)) and times.furthest_step > step_of(steps(run)[0]) + 3

    began = time.time()
    with launch(*LONG) as running:
        running.wait_for(is_ahead, 300)
        running.kill_all()
    furthest, saved = read_times(run).furthest_step, step_of(steps(run)[0])
    assert furthest > saved
    with launch("--training.max_steps", str(furthest + MORE_STEPS), "--schedule.decay_steps", "null") as running:
        running.wait_for(lambda: LAST_LINE in running.stdout, 300)
        wall = time.time() - began  # processes then take a while to vanish
        done = running.finish()
    assert done.returncode == 0, done.stderr
    times = read_times(run)
    first, second = times.launches
    assert sum(times.seconds.values()) == pytest.approx(wall, rel=0.01)
    assert (first.after_step, first.exit_code, first.recomputed_steps) == (0, None, 0)
    assert (second.after_step, second.step, second.exit_code) == (saved, furthest + MORE_STEPS, 0)
    assert second.recomputed_steps == furthest - saved
    for kind in ("productive", "recomputed", "save_stall", "data_wait", "start_up", "validation", "restart"):
        assert times.seconds[kind] > 0, kind
    assert second.seconds["restart"] + first.seconds["start_up"] < wall
    last = [record for record in read_records(run / "metrics.jsonl") if "loss" in record][-1]
    assert last["wall_seconds"]["recomputed"] == round(times.seconds["recomputed"], 3)
    (line,) = [line for line in done.stdout.splitlines() if LAST_LINE in line]
    assert "in 2 launches: productive " in line
    assert "the one before was killed or failed" in page(read_run(run))


def test_a_damaged_file_does_not_end_the_run(tmp_path):
    run, (recipe, data) = tmp_path / "run", prepare(tmp_path)
    run.mkdir()
    (run / GOODPUT_FILE).write_bytes(b"")
    flags = ["train.py", "--recipe", recipe, "--deepspeed_config", "ds_configs/zero2_fp32.json", "--data", data]
    done = run_python([*flags, "--output", str(run), "--training.max_steps", "4", "--schedule.decay_steps", "null"])
    assert done.returncode == 0, done.stderr
    assert f"{GOODPUT_FILE} cannot be read: remove it, and times are counted anew" in done.stdout
    assert len(read_times(run).launches) == 1
