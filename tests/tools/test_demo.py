"""The demo's kill and resume: nothing is lost or repeated, in `metrics.jsonl` nor in W&B."""

import re

from tests.engine.programs import prepare
from tests.processes import free_port, run_cli
from tests.training.test_wandb_sync import by_step, synced
from training.metrics import LAYERS_FILE, METRICS_FILE
from training.records import read_records

DEMO = """
import sys
from pathlib import Path
from tools.demo import check_nothing_lost, kill_at_checkpoint, run
train, output = sys.argv[2:], Path(sys.argv[1])
kill_at_checkpoint(train, output, 4)
run(train)
check_nothing_lost(output, 24)
"""
TIMES = re.compile(r"speed/|progress/eta_seconds")


def test_wandb_sync_sends_every_row_of_the_killed_and_resumed_run_once(tmp_path):
    """By the demo's own steps, with the launcher that it uses, on a small model."""
    recipe, data = prepare(tmp_path)
    launcher = ["deepspeed", "--quiet", "--num_gpus", "2", "--master_port", str(free_port())]
    train = ["train.py", "--recipe", recipe, "--deepspeed_config", "ds_configs/zero2_fp32.json", "--data", data]
    train += ["--output", str(tmp_path / "run"), "--training.max_steps", "24", "--logging.wandb", "true"]
    train += ["--checkpoint.background", "false"]  # its event comes in the row of its step
    env = {"HOME": str(tmp_path / "home"), "WANDB_MODE": None}
    done = run_cli(["python", "-c", DEMO, str(tmp_path / "run"), *launcher, *train], env=env, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    resumed = re.search(r"killed \(SIGKILL\) after the checkpoint of step (\d+)", done.stdout)
    assert "no step lost or repeated: 24 log lines up to step 24" in done.stdout

    files, rows = synced(tmp_path / "run")
    written = [read_records(tmp_path / "run" / name) for name in (METRICS_FILE, LAYERS_FILE)]
    expected = by_step([*written[0], *written[1]])
    assert 1 <= len(files) <= 2  # a launch that was killed early leaves none
    # The resume comes with the first row that the killed launch has not sent; steps that both made took other times.
    assert sum(row.pop("events/resume", 0) for row in rows.values()) == 1
    assert expected[int(resumed[1])].pop("events/resume") == 1
    for step in range(int(resumed[1]) + 1, 25):
        for row in (rows[step], expected[step]):
            for key in filter(TIMES.match, [*row]):
                del row[key]
    assert rows == expected
