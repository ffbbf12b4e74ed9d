"""A process that is asked to stop: when it ends, with which code, and that it hears it at all."""

import signal
import sys
import time

import pytest

from tests.processes import ROOT, start_cli

RANK = """
import sys, time
from launch.signals import StopSignal
stop = StopSignal()
if "loop" in sys.argv:
    stop.leave_to_the_loop()
print("ready", flush=True)
if "deaf" in sys.argv:  # in a library that does not come back to Python
    import threading
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
while stop.name is None or "busy" in sys.argv:
    time.sleep(0.05)
    if stop.name:
        print("asked:", stop.name, flush=True)
sys.exit(stop.exit_code)
"""
OTHERS = {
    "a worker of a DataLoader that ends": """
from torch.utils.data import DataLoader
list(DataLoader(range(4), num_workers=1))
""",
    "a timer of a library": """
import signal, time
signal.signal(signal.SIGALRM, lambda *_: None)
signal.setitimer(signal.ITIMER_REAL, 0.01)
time.sleep(0.2)
""",
}
"""Signals that Python code handles and that ask nobody to stop."""
LAUNCHER = """
import subprocess, sys
sys.exit(subprocess.run([sys.executable, "-c", {rank!r}, *{words!r}]).returncode)
"""


def started(*words: str):
    return start_cli([sys.executable, "-c", RANK, *words])


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGHUP", 75), ("SIGINT", 130)])
def test_before_the_first_step_it_ends_at_once_even_inside_a_library(name, code):
    with started("deaf") as running:
        running.wait_for(lambda: "ready" in running.stdout)
        running.send_signal(signal.Signals[name])
        done = running.finish(20)
    assert (done.returncode, done.stderr) == (
        code,
        f"stopped ({name}) before the first step: run the same command again\n",
    )


def test_in_the_loop_the_first_request_counts_and_a_second_interrupt_ends():
    with started("loop", "busy") as running:
        running.wait_for(lambda: "ready" in running.stdout)
        running.send_signal(signal.SIGINT)
        running.send_signal(signal.SIGINT)  # passed on by a launcher that had the same
        running.wait_for(lambda: "asked: SIGINT" in running.stdout)
        running.send_signal(signal.SIGTERM)
        time.sleep(2.5)
        assert running.process.poll() is None
        running.send_signal(signal.SIGINT)
        done = running.finish(20)
    assert done.returncode == 130
    assert "interrupted again" in done.stderr
    assert "SIGTERM" not in done.stdout


@pytest.mark.parametrize("words", [["loop"], []])
@pytest.mark.parametrize("other", OTHERS)
def test_signals_of_others_are_no_request_and_take_the_place_of_none(other, words):
    before, ready, after = RANK.partition('print("ready", flush=True)\n')
    with start_cli([sys.executable, "-c", before + OTHERS[other] + ready + after, *words]) as running:
        running.wait_for(lambda: "ready" in running.stdout)
        time.sleep(0.7)
        assert running.process.poll() is None
        running.send_signal(signal.SIGTERM)
        done = running.finish(20)
    assert done.returncode == 75
    assert ("asked: SIGTERM" in done.stdout) == ("loop" in words)


@pytest.mark.parametrize("words", [["loop"], []])
def test_the_end_of_the_launcher_is_a_request(tmp_path, words):
    launcher = tmp_path / "torchrun"
    launcher.write_text(LAUNCHER.format(rank=RANK, words=words))
    with start_cli([sys.executable, launcher]) as running:
        running.wait_for(lambda: "ready" in running.stdout)
        running.process.kill()
        running.process.wait()
        deadline = time.monotonic() + 20
        while running.alive():
            assert time.monotonic() < deadline, "an orphan"
            time.sleep(0.05)


def test_without_its_deepspeed_a_launch_starts_nothing(tmp_path):
    """The runner is killed while `deepspeed.launcher.launch` still imports: what that starts later ends at once."""
    module = tmp_path / "deepspeed/launcher/launch.py"
    module.parent.mkdir(parents=True)
    for folder in module.parents[:2]:
        (folder / "__init__.py").touch()
    module.write_text("import time\ntime.sleep(1)\n" + LAUNCHER.format(rank=RANK, words=[]))
    start = "import subprocess, sys; subprocess.Popen([sys.executable, '-u', '-m', 'deepspeed.launcher.launch'])"
    command = ["bash", "-c", '"$0" -c "$1"; exec sleep 600', sys.executable, start]
    with start_cli(command, env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}) as running:
        running.wait_for(lambda: "stopped (end of the launcher) before the first step" in running.stderr, 60)
        running.wait_for(lambda: running.alive() == 1, 20)


def test_nohup_is_respected():
    with start_cli(["bash", "-c", 'trap "" HUP; exec "$@"', "bash", sys.executable, "-c", RANK, "loop"]) as running:
        running.wait_for(lambda: "ready" in running.stdout)
        running.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert running.process.poll() is None
