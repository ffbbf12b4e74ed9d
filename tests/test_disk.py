"""What a disk, a terminal and a diverging run can do to a training: no step is lost without a word, nothing lies half-written."""

import re
import shutil
import signal
import sys
from pathlib import Path

import pytest

from engine.checkpoint.manifest import read_manifest, step_of, steps
from tests.cluster.network import missing_device
from tests.engine.programs import prepare
from tests.forks import run_python
from tests.processes import run_cli, start_cli
from tests.test_stopping import paused
from training.records import read_records

OFTEN = ["--checkpoint.every_steps", "1", "--checkpoint.keep_last", "2", "--validation.every_steps", "null"]
TERMINAL = """
import os, subprocess, sys
ours, theirs = os.openpty()
training = subprocess.Popen(sys.argv[1:], stdout=theirs, stderr=theirs)
os.close(theirs)
seen = b""
while b" 2/40 | loss" not in seen:
    seen += os.read(ours, 4096)
os.close(ours)
sys.exit(training.wait())
"""


@pytest.fixture(scope="module")
def train(tmp_path_factory) -> list[str]:
    """What `python` is given, without --output."""
    recipe, data = prepare(tmp_path_factory.mktemp("disk"))
    flags = ["--recipe", recipe, "--deepspeed_config", "ds_configs/zero2_fp32.json", "--data", data]
    return ["train.py", *flags, *OFTEN]


def events(run: Path, name: str) -> list[dict]:
    return [record for record in read_records(run / "metrics.jsonl") if record.get("event") == name]


def notices(run: Path) -> list[str]:
    return [record["text"] for record in events(run, "notice")]


def kept(run: Path) -> list[int]:
    return [step_of(folder) for folder in steps(run) if read_manifest(folder)]


def test_a_diverging_run_keeps_what_was_healthy_and_goes_on_from_there(train, tmp_path):
    """Meanwhile the first checkpoint cannot be deleted: said, and no reason to lose the others."""
    run = tmp_path / "run"
    command = [
        *train,
        "--output",
        str(run),
        "--schedule.decay_steps",
        "1",
        "--training.max_consecutive_skipped_steps",
        "4",
    ]
    healthy = run_python([*command, "--training.max_steps", "3"])
    assert healthy.returncode == 0, healthy.stderr
    assert kept(run) == [3, 2]
    obstacle = run / "checkpoints/.step-00000002.partial"
    obstacle.touch()

    diverged = run_python([*command, "--training.max_steps", "20", "--optimizer.lr", "1e30"])
    assert diverged.returncode == 2, diverged.stderr
    assert "4 steps in a row had a loss or gradient that is not finite" in diverged.stderr
    assert "could not be written" not in diverged.stderr
    applied = {
        step for step in kept(run) if not read_manifest(run / f"checkpoints/step-{step:08d}").state.skipped_steps
    }
    assert 3 in applied, kept(run)
    about = [text for text in notices(run) if "cannot be deleted" in text]
    assert about, notices(run)
    assert all("Not a directory" in text for text in about)

    obstacle.unlink()
    again = run_python([*command, "--training.max_steps", "6", "--optimizer.lr", "1e-3", "--resume_step", "3"])
    assert again.returncode == 0, again.stderr
    assert kept(run) == [6, 5]
    losses = {record["step"]: record["loss"] for record in read_records(run / "metrics.jsonl") if "loss" in record}
    assert sorted(losses) == list(range(1, 7))
    assert all(loss < 10 for loss in losses.values())


def test_checkpoints_taken_away_are_missed_and_a_closed_terminal_is_not(train, tmp_path):
    run = tmp_path / "run"
    in_terminal = [
        sys.executable,
        "-c",
        TERMINAL,
        sys.executable,
        *train,
        "--output",
        str(run),
        "--training.max_steps",
        "40",
    ]
    with start_cli(in_terminal) as running:
        running.wait_for(lambda: (run / "metrics.jsonl").exists() and len(events(run, "checkpoint")) >= 4)
        running.wait_for(lambda: paused(running, run, saving=False))
        shutil.rmtree(run / "checkpoints")
        running.kill_all(signal.SIGCONT)
        done = running.finish()
    assert done.returncode == 0, done.stdout + done.stderr
    assert kept(run) == [40, 39]
    failed = events(run, "checkpoint_failed")  # the one that was being written, if any was
    assert len(failed) <= 1
    assert len(events(run, "checkpoint") + failed) == 40
    (notice,) = notices(run)
    assert re.fullmatch(
        rf"{run}/checkpoints: step-\d+(, step-\d+)* was removed while training ran, by something else", notice
    )


def test_a_full_disk_does_not_end_training_before_its_last_save(train, tmp_path):
    """Each save that has no room is said and leaves nothing; then room comes back, or does not until the end."""
    if reason := missing_device():
        pytest.skip(reason)
    run = tmp_path / "run"
    for background in ("true", "false"):
        copy = tmp_path.with_name(f"{tmp_path.name}.copy.{background}")
        script = f'mount -t tmpfs -o size=1200k tmpfs {tmp_path}; "$@"; code=$?; cp -r {run} {copy}; exit $code'
        command = [*train, "--output", str(run), "--checkpoint.background", background]
        done = run_cli(["unshare", "--mount", "bash", "-c", script, "bash", sys.executable, *command])
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert line.startswith(
            f"error: {run}/checkpoints: the checkpoint of step 8 could not be written (No space left"
        )
        assert "; the earlier ones are as they were: make room or mend the file system and run the same" in line
        good, failed = (
            [record["step"] for record in events(copy, name)] for name in ("checkpoint", "checkpoint_failed")
        )
        assert kept(copy) == good[::-1]
        assert good
        assert sorted(good + failed) == list(range(1, 9))
        assert all("training goes on" in record["text"] for record in events(copy, "checkpoint_failed"))
        assert not list((copy / "checkpoints").glob(".*"))


def read_only(folder: Path, command: list[str]) -> list[str]:
    """The command where this folder is mounted without the right to write, which root has not either."""
    script = 'mount --bind "$0" "$0"; mount -o remount,bind,ro "$0"; exec "$@"'
    return ["unshare", "--mount", "bash", "-ec", script, str(folder), sys.executable, *command]


def test_folders_that_may_only_be_read(train, tmp_path):
    """Of the data nothing else is asked; a run that cannot be written says where, before or at its first save."""
    if reason := missing_device():
        pytest.skip(reason)
    run, data = tmp_path / "run", Path(train[train.index("--data") + 1])
    limits = ["--schedule.warmup_steps", "0", "--schedule.decay_steps", "null", "--schedule.schedule", "constant"]
    command = [*train, "--output", str(run), *limits, "--training.max_steps"]
    done = run_cli(read_only(data, [*command, "1"]), timeout=300)
    assert done.returncode == 0, done.stderr
    for folder, sentence in (
        (run, rf"error: --output {run}: Read-only file system"),
        (run / "checkpoints", rf"error: {run}/checkpoints: the checkpoint of step 2 .*\(Read-only file system\); .*"),
    ):
        done = run_cli(read_only(folder, [*command, "2"]), timeout=300)
        assert done.returncode == 2, done.stderr
        (line,) = done.stderr.splitlines()
        assert re.fullmatch(sentence, line), line
        assert kept(run) == [1]
