"""A run is started again where that can help, and only there."""

import signal
import sys
import time
from pathlib import Path

import pytest

from launch.endings import Ending, why_not_again
from launch.signals import EXIT_HUNG
from tests.engine.programs import prepare
from tests.processes import ROOT, free_port, run_cli, start_cli
from tests.test_stopping import LONG, hearing, named, records, wait_until_all_have_ended
from training.goodput import read_times

CRASH = Ending(1, 7, "KeyError: 'a'")
KILLED = Ending(247, 7, "a collective failed: node1 (rank 1) was killed, pid 17")


@pytest.mark.parametrize(
    ("ending", "earlier", "sentence"),
    [
        (Ending(0, 9, ""), [], "finished"),
        (Ending(2, 9, "bad"), [], "what it says has to be mended"),
        (Ending(75, 9, ""), [], "it was asked to stop"),
        (Ending(130, 9, ""), [], "it was asked to stop"),
        (Ending(1, None, "bad"), [], "it ended before its first step, which a restart does not cure"),
        (CRASH, [], ""),
        (CRASH, [CRASH], "step 8 failed a second time for the same reason: look at its documents"),
        (CRASH, [CRASH._replace(step=6), CRASH._replace(words="other")], ""),
        (KILLED._replace(words="a collective failed: node1 (rank 1) was killed, pid 18"), [KILLED], "step 8 failed a"),
        (Ending(EXIT_HUNG, 7, ""), [KILLED], ""),
        (KILLED._replace(lost=("node2",)), [KILLED._replace(lost=("node2",))], ""),
        (Ending(1, None, "", lost=("node2",)), [], ""),
        (Ending(75, 9, "", returned=("node2",)), [], ""),
        (CRASH, [Ending(1, step, "") for step in range(3)], "it was restarted 3 times (--max-restarts)"),
        (KILLED._replace(lost=("a",)), [KILLED] * 3, "it was restarted 3 times (--max-restarts)"),
    ],
)
def test_what_is_restarted(ending, earlier, sentence):
    found = why_not_again(ending, earlier, most=3)
    assert found.startswith(sentence)
    assert bool(found) == bool(sentence)


STAND_IN = """
import json, os, pathlib, signal, sys, time
run = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
run.mkdir(exist_ok=True)
turn = len(list(run.glob("launch-*")))
(run / f"launch-{turn}").write_text((run / ".restart.json").read_text() if turn else "")
step, code, words = json.loads(sys.argv[1])[turn]
if step:
    (run / ".step").write_text(str(step))
if words:
    print("node9: error: " + words, file=sys.stderr)
if code == "wait":
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
    (run / "waits").touch()
    time.sleep(100)
if code == "deaf":
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    (run / "waits").touch()
    time.sleep(100)
if code == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("scenario", "code", "launches", "last"),
    [
        (
            '[[3, 76, ""], [5, 1, "gone"], [5, 0, ""]]',
            0,
            3,
            "supervisor: restart 2 of at most 10 in 1 s, after step 5: exit",
        ),
        (
            '[[3, 1, "gone"], [0, 1, "RendezvousClosedError"], [5, 0, ""]]',
            0,
            3,
            "supervisor: restart 1 of at most 10 in",
        ),
        (
            '[[0, 1, "RendezvousClosedError"]]',
            1,
            1,
            "supervisor: not restarted: it ended before its first step, which a restart does not cure (exit code 1: Ren",
        ),
        (  # as its ranks do when a launcher is killed: what is left of it tells that they have saved
            '[[3, "killed", "launch.py: Process 7 exits with return code = 75"], [5, 0, ""]]',
            0,
            2,
            "supervisor: restart 1 of at most 10 in 1 s, after step 3: killed",
        ),
        ('[[3, 1, "a 1"], [3, 1, "a 2"]]', 1, 2, "supervisor: not restarted: step 4 failed a second time for the same"),
        ('[[0, 1, "a 1"]]', 1, 1, "supervisor: not restarted: it ended before its first step"),
        ('[[4, 2, "full"]]', 2, 1, "supervisor: not restarted: what it says has to be mended (exit code 2: full)"),
    ],
)
def test_without_torch_and_with_any_launcher(scenario, code, launches, last, tmp_path):
    (tmp_path / "train.py").write_text(STAND_IN)
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is imported')")
    command = [sys.executable, "train.py", scenario, "--output", "run"]
    supervise = [sys.executable, "-m", "tools.supervise", "--", *command]
    done = run_cli(supervise, cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert done.returncode == code, done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith(last)], done.stderr
    assert len(list((tmp_path / "run").glob("launch-*"))) == launches


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGUSR1, 75), (signal.SIGHUP, 75)]
)
def test_who_is_asked_to_stop_asks_the_ranks_of_this_run(number, code, tmp_path):
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    for folder in (here, elsewhere):
        folder.mkdir()
        (folder / "train.py").write_text(STAND_IN)
    command = [sys.executable, "train.py", '[[3, "wait", ""]]', "--output", "run"]
    supervised = [sys.executable, "-m", "tools.supervise", "--", *command]
    with start_cli(command, cwd=elsewhere) as other, start_cli(supervised, cwd=here) as running:
        other.wait_for((elsewhere / "run/waits").exists)
        running.wait_for((here / "run/waits").exists)
        running.send_signal(number)
        assert running.finish(30).returncode == code, running.stderr
        assert other.process.poll() is None, "a run of the same name in another folder is told"


@pytest.mark.parametrize(
    ("numbers", "grace", "code", "words"),
    [
        ([signal.SIGTERM], "1", 137, "supervisor: ends what is left after 1 s"),
        ([signal.SIGINT, signal.SIGINT], "600", 130, "supervisor: ends, interrupted again"),
        ([signal.SIGINT], "1", 130, "supervisor: ends what is left after 1 s"),
    ],
)
def test_who_does_not_end_in_time_is_killed(numbers, grace, code, words, tmp_path):
    (tmp_path / "train.py").write_text(STAND_IN)
    command = [sys.executable, "-m", "tools.supervise", "--grace-seconds", grace, "--", sys.executable, "train.py"]
    with start_cli([*command, '[[3, "deaf", ""]]', "--output", "run"], cwd=tmp_path) as running:
        running.wait_for((tmp_path / "run/waits").exists)
        for number in numbers:
            running.send_signal(number)
            time.sleep(0.3)  # equal signals that wait become one
        assert running.finish(30).returncode == code, running.stderr
        assert running.stderr.splitlines() == [words]
        assert running.alive() == 0


SRUN = """#!/bin/bash
# Two tasks, of which the second is said to be on another host; SIGUSR1 is passed on, and the exit code is the largest.
trap 'kill -USR1 "${tasks[@]}"' USR1
"$@" & tasks+=($!)
(shift 3; exec sleep 100) & tasks+=($!)
for task in 0 1; do
    while kill -0 "${tasks[task]}" 2>/dev/null; do wait "${tasks[task]}"; code=$?; done
    if [ $code -eq 137 ]; then echo "srun: error: node2: task 1: Killed" >&2; kill "${tasks[1]}"; exit 137; fi
    if [ $task -eq 0 ]; then
        worst=$code
        [ $code -eq 1 ] && { echo "srun: error: node1: task 0: Exited with exit code 1" >&2; kill "${tasks[1]}"; exit 1; }
    fi
done
exit $worst
"""


def test_under_slurm_a_killed_task_is_named_and_a_request_reaches_the_tasks(tmp_path):
    """The same decisions as with any launcher; SIGUSR1 goes through `srun`, which alone reaches the other hosts."""
    (tmp_path / "train.py").write_text(STAND_IN)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/srun").write_text(SRUN)
    (tmp_path / "bin/srun").chmod(0o755)
    scenario = '[[3, "killed", ""], [4, 1, "gone"], [5, "wait", ""]]'
    command = [sys.executable, "-m", "tools.supervise", "--", "srun", sys.executable, "train.py", scenario]
    path = f"{tmp_path}/bin:{Path(sys.executable).parent}:/usr/bin:/bin"
    with start_cli([*command, "--output", "run"], cwd=tmp_path, env={"PATH": path}) as running:
        running.wait_for((tmp_path / "run/waits").exists)
        running.send_signal(signal.SIGTERM)
        done = running.finish(30)
        assert running.alive() == 0
    assert done.returncode == 75, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("supervisor: restart ")]
    assert told[0] == "supervisor: restart 1 of at most 10 in 1 s, after step 3: killed: node2: task 1: Killed"
    assert told[1].endswith(", after step 4: exit code 1: gone"), "what the rank has told, not Slurm of every task"
    refused = run_cli([*command[:3], "--hostfile", "hosts", *command[3:], "--output", "run"], cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stderr == "error: --hostfile is for `deepspeed`: let the words after -- begin with train.py\n"


def test_a_killed_rank_of_a_real_run_and_a_request_to_stop(tmp_path):
    run, (recipe, data) = tmp_path / "run", prepare(tmp_path)
    flags = ["train.py", "--recipe", recipe, "--deepspeed_config", "ds_configs/zero2_fp32.json", "--data", data, *LONG]
    flags += ["--output", str(run), "--validation.every_steps", "null", "--checkpoint.every_steps", "2"]
    launch = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), *flags]
    supervise = [sys.executable, "-m", "tools.supervise", "--", *launch]
    with start_cli(supervise) as running:
        running.wait_for(lambda: len(named(run, "checkpoint")) >= 2, 300)
        (rank,) = [each for each in hearing(running.process.pid) if "--local_rank=1" in each.cmdline()]
        rank.kill()
        running.wait_for(lambda: named(run, "restart") and "loss" in records(run)[-1], 300)
        running.send_signal(signal.SIGTERM)
        done = running.finish()
        assert running.alive() == 0
    assert done.returncode == 75, done.stderr
    (restart,) = named(run, "restart")
    assert restart["number"] == 1
    assert restart["reason"].startswith("killed: a collective failed: ")
    assert "(rank 1) was killed" in restart["reason"]
    assert restart["after_step"] >= 4
    assert [launch.reason for launch in read_times(run).launches] == ["", restart["reason"]]
    assert [stop["reason"] for stop in named(run, "stop")] == ["SIGUSR1"]

    with start_cli(supervise) as running:  # which is killed itself
        running.wait_for(lambda: len(named(run, "resume")) == 2 and "loss" in records(run)[-1], 300)
        running.send_signal(signal.SIGKILL)
        wait_until_all_have_ended(running)
    assert named(run, "stop")[-1]["reason"] == "end of the launcher"
