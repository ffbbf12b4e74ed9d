"""Stopped, or left by its launcher, a run saves once, ends everywhere, and goes on by the same command."""

import contextlib
import os
import re
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from engine.checkpoint.manifest import read_manifest, steps
from tests.cluster.network import missing_device
from tests.engine.programs import prepare
from tests.forks import start_python
from tests.processes import ROOT, free_port, start_cli
from tests.test_readme import README
from training.records import read_records

LONG = ["--training.max_steps", "100000", "--schedule.decay_steps", "null", "--checkpoint.every_steps", "100000"]


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder of a run, and the flags that start or continue it."""
    folder = tmp_path_factory.mktemp("stopping")
    recipe, data = prepare(folder)
    flags = ["--recipe", recipe, "--deepspeed_config", "ds_configs/zero2_fp32.json", "--data", data]
    return folder / "run", ["train.py", *flags, "--output", str(folder / "run"), *LONG]


def launch(*command: str):
    return start_cli(command)


def records(run: Path) -> list[dict]:
    return read_records(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []


def named(run: Path, event: str) -> list[dict]:
    return [record for record in records(run) if record.get("event") == event]


def wait_until_all_have_ended(running) -> None:
    deadline = time.monotonic() + 120
    while running.alive():
        assert time.monotonic() < deadline, "an orphan"
        time.sleep(0.1)


def test_each_launcher_may_be_signalled_alone(setting):
    """`deepspeed`, which dies of it, and `torchrun`, which knows no SIGUSR1; then all processes, twice the same Ctrl-C."""
    run, flags = setting
    never = ["--validation.every_steps", "null"]
    with launch("deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), *flags, *never) as running:
        running.wait_for(lambda: len(records(run)) >= 3, 300)
        running.send_signal(signal.SIGTERM)
        assert running.finish().returncode == -signal.SIGTERM  # the launcher's own: no handler
        wait_until_all_have_ended(running)
        assert "exits with return code = 75" in running.stderr + running.stdout
    assert [stop["reason"] for stop in named(run, "stop")] == ["end of the launcher"]
    assert [folder.name for folder in steps(run)] == [f"step-{named(run, 'stop')[0]['step']:08d}"]

    often = ["--validation.every_steps", "1"]  # so that most of the time is spent in it
    with launch("torchrun", "--nproc_per_node", "2", "--master_port", str(free_port()), *flags, *often) as running:
        running.wait_for(lambda: len([r for r in records(run) if "validation" in r]) >= 2, 300)
        running.send_signal(signal.SIGUSR1)
        assert running.finish().returncode == -signal.SIGUSR1
        wait_until_all_have_ended(running)
    assert [stop["reason"] for stop in named(run, "stop")] == ["end of the launcher"] * 2
    assert len(steps(run)) == 2

    with launch("torchrun", "--nproc_per_node", "2", "--master_port", str(free_port()), *flags, *never) as running:
        running.wait_for(lambda: len(named(run, "resume")) == 2 and "loss" in records(run)[-1], 300)
        running.kill_all(signal.SIGINT)
        assert running.finish().returncode == 1  # torchrun's own, whatever its ranks do
        wait_until_all_have_ended(running)
    assert [stop["reason"] for stop in named(run, "stop")][2:] == ["SIGINT"]
    assert len(steps(run)) == 3


def paused(running, run: Path, saving: bool) -> bool:
    """Whether all processes now stand still with a checkpoint half-written, or without one; else they go on."""
    running.kill_all(signal.SIGSTOP)
    if found := saving == bool(list((run / "checkpoints").glob(".*"))):
        return found
    running.kill_all(signal.SIGCONT)
    return False


def hearing(launcher: int) -> list[psutil.Process]:
    """The ranks of a launcher that have a handler for SIGUSR1."""
    ranks = []
    for process in psutil.Process(launcher).children(recursive=True):
        with contextlib.suppress(psutil.Error, OSError):  # one that has just ended
            caught = int(re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())[1], 16)
            if "train.py" in process.cmdline()[:3] and caught >> (signal.SIGUSR1 - 1) & 1:
                ranks.append(process)
    return ranks


def test_the_whole_group_is_signalled_in_a_save_and_while_the_ranks_still_import(setting, tmp_path):
    run = tmp_path / "run"
    flags = [*setting[1], "--output", str(run), "--validation.every_steps", "null", "--checkpoint.every_steps", "1"]
    with launch("deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), *flags) as running:
        running.wait_for(lambda: len(hearing(running.process.pid)) == 2, 300)
        os.killpg(running.process.pid, signal.SIGUSR1)
        assert running.finish().returncode == -signal.SIGUSR1
        wait_until_all_have_ended(running)
        assert "before the first step: run the same command again" in running.stderr
    assert not run.exists()

    with launch("deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), *flags) as running:
        running.wait_for(lambda: named(run, "checkpoint"), 300)
        running.wait_for(lambda: paused(running, run, saving=True))
        before = len(named(run, "checkpoint"))
        os.killpg(running.process.pid, signal.SIGINT)
        running.kill_all(signal.SIGCONT)
        assert running.finish().returncode == -signal.SIGINT  # 130 in a shell
        wait_until_all_have_ended(running)
    assert len(named(run, "checkpoint")) in (before + 1, before + 2)  # that, and the one of a step done meanwhile
    (stop,) = named(run, "stop")
    assert stop["reason"] == "SIGINT"
    assert read_manifest(steps(run)[0]).state.step == stop["step"]
    assert not list((run / "checkpoints").glob(".*"))


def test_the_readme_script_is_the_first_process_of_a_container(setting, tmp_path):
    if os.geteuid() != 0 or missing_device():
        pytest.skip("process namespaces need root")
    run, flags = tmp_path / "run", setting[1]
    (script,) = [block for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if "setsid deepspeed" in block]
    arguments = " ".join([*flags, "--output", str(run), "--validation.every_steps", "null"])
    ours = f"deepspeed --num_gpus 2 --master_port {free_port()} {arguments}) &"
    script, changed = re.subn(r"deepspeed --num_gpus.*?\) &", ours, script, flags=re.DOTALL)
    assert changed == 1
    (tmp_path / "service").write_text(script)
    container = ["unshare", "--pid", "--fork", "--mount-proc", "bash", str(tmp_path / "service")]
    with launch(*container) as running:
        running.wait_for(lambda: len(records(run)) >= 2, 300)
        (first,) = psutil.Process(running.process.pid).children()
        first.send_signal(signal.SIGTERM)
        assert running.finish().returncode == 75
        wait_until_all_have_ended(running)
    assert [stop["reason"] for stop in named(run, "stop")] == ["SIGUSR1"]
    assert len(steps(run)) == 1

    with launch(*container) as running:  # asked before there are ranks
        running.wait_for(lambda: "deepspeed" in words_of_descendants(running.process.pid), 300)
        running.kill_all(signal.SIGSTOP)
        assert "train.py --local_rank" not in words_of_descendants(running.process.pid)
        (first,) = psutil.Process(running.process.pid).children()
        first.send_signal(signal.SIGTERM)
        running.kill_all(signal.SIGCONT)
        assert running.finish(90).returncode == 75
        wait_until_all_have_ended(running)
        assert "stopped (SIGUSR1) before the first step" in running.stderr


def words_of_descendants(pid: int) -> str:
    """The command lines of the processes that it and they started."""
    lines = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            lines.append(" ".join(process.cmdline()))
    return "\n".join(lines)


HELD = """
import os, pathlib, sys
if os.path.basename(sys.argv[0]) == "train.py":
    pathlib.Path({folder!r}, "importing").touch()
    os.open({fifo!r}, os.O_RDONLY)  # until somebody writes, which nobody does
"""


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGHUP", 75), ("SIGINT", 130)])
def test_an_import_that_does_not_end_is_no_reason_not_to_hear(tmp_path, name, code):
    """Torch takes seconds to import, and minutes from a busy file system."""
    (tmp_path / "torch").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "torch/__init__.py").write_text(HELD.format(folder=str(tmp_path), fifo=str(tmp_path / "fifo")))
    flags = ["--recipe", "r.yaml", "--deepspeed_config", "d.json", "--data", "data", "--output", str(tmp_path / "run")]
    with start_cli([sys.executable, "train.py", *flags], env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}) as running:
        running.wait_for((tmp_path / "importing").exists, 60)
        running.send_signal(signal.Signals[name])
        done = running.finish(20)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr == f"stopped ({name}) before the first step: run the same command again\n"


def test_a_folder_that_is_taken_away_ends_the_run(setting, tmp_path):
    flags = [*setting[1], "--output", str(tmp_path / "run"), "--validation.every_steps", "null"]
    with start_python(flags) as running:
        running.wait_for(lambda: len(records(tmp_path / "run")) >= 2, 300)
        (tmp_path / "run").rename(tmp_path / "elsewhere")
        done = running.finish()
    assert done.returncode == 2
    assert (
        f"error: {tmp_path}/run/metrics.jsonl was removed, moved or replaced while training wrote to it" in done.stderr
    )
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()

    run = tmp_path / "second"
    with start_python([*flags, "--output", str(run), "--checkpoint.every_steps", "20"]) as running:
        running.wait_for(lambda: len(records(run)) >= 2, 300)
        (run / ".lock").unlink()
        done = running.finish()
    assert done.returncode == 2
    assert f"error: {run} was removed, moved or replaced while training wrote to it, or its .lock was" in done.stderr
