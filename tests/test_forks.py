"""What runs in a fork is what would run in a process of its own."""

import signal
from pathlib import Path

import psutil
import pytest

from tests.forks import run_python, start_python
from tests.processes import run_cli
from tests.test_processes import assert_gone

ABOUT = """
import __main__, json, os, resource, signal, sys
print(json.dumps({
    "environment": {k: v for k, v in os.environ.items() if k != "LONGFORM_TEST_PROCESS"}, "argv": sys.argv,
    "path": sys.path, "cwd": os.getcwd(), "stdin": sys.stdin.read(), "leads": os.getsid(0) == os.getpid(),
    "name": __name__, "itself": __main__.__name__, "core": resource.getrlimit(resource.RLIMIT_CORE),
    "signals": [str(signal.getsignal(n)).split(" at ")[0] for n in (2, 1, 15, 10)], "open": len(os.listdir("/proc/self/fd")),
    "locals": sorted(name for name in globals() if not name.startswith("_")),
}))
print("said", file=sys.stderr)
sys.exit(7)
"""
HANG = "import os, pathlib, sys; pathlib.Path(sys.argv[1], os.environ.get('RANK', '0')).write_text(str(os.getpid()))\n"
HANG += "import time; time.sleep(600)"


@pytest.mark.parametrize("kind", ["-c", "file", "-m"])
def test_it_is_what_python_would_start(tmp_path, kind):
    (tmp_path / "about.py").write_text(ABOUT)
    words = {"-c": ["-c", ABOUT], "file": ["about.py"], "-m": ["-m", "about"]}[kind]
    locale = {"LC_ALL": "C.UTF-8"}  # without any Python sets one when it starts (PEP 538)
    options = {"env": locale | {"EXTRA": "1", "WANDB_MODE": None}, "cwd": tmp_path, "stdin": "given"}
    fork, process = run_python([*words, "a", "b"], **options), run_cli(["python", *words, "a", "b"], **options)
    assert (fork.returncode, fork.stderr) == (process.returncode, process.stderr) == (7, "said\n")
    assert fork.stdout == process.stdout
    assert '"given"' in fork.stdout


def test_an_error_is_a_traceback_and_a_signal_is_the_code():
    done = run_python(["-c", "raise KeyError('reason')"])
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("KeyError: 'reason'\n")
    assert run_python(["-c", "import os; os.kill(os.getpid(), 9)"]).returncode == -signal.SIGKILL


def test_timeout_kills_the_whole_tree(tmp_path):
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HANG!r}, sys.argv[1]])"
    with pytest.raises(TimeoutError, match="most recent call first"):
        run_python(["-c", script, tmp_path], timeout=3)
    assert_gone([int((tmp_path / "0").read_text())])


def test_it_is_signalled_while_it_runs():
    script = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(3)); print('ready'); time.sleep(600)"
    with start_python(["-c", script]) as running:
        running.wait_for(lambda: "ready" in running.stdout)
        assert running.alive() == 1
        running.send_signal(signal.SIGTERM)
        assert running.finish(30).returncode == 3
        assert running.alive() == 0


def ranks_file(folder: Path, program: str) -> list[str]:
    (folder / "program.py").write_text(program)
    return [str(folder / "program.py"), str(folder)]


def test_ranks_get_what_a_launcher_gives(tmp_path):
    program = "import os, sys; print(sys.argv[1], *(os.environ[n] for n in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_SIZE')))"
    done = run_python(ranks_file(tmp_path, program), ranks=2)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["--local_rank=0 0 0 2 2", "--local_rank=1 1 1 2 2"]


def test_the_first_rank_that_fails_ends_the_others(tmp_path):
    program = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(5)\ntime.sleep(600)"
    assert run_python(ranks_file(tmp_path, program), ranks=2, timeout=60).returncode == 5


def test_ranks_are_all_killed(tmp_path):
    words = ranks_file(tmp_path, HANG.replace("argv[1]", "argv[2]"))
    with start_python(words, ranks=2) as running:
        running.wait_for(lambda: all(text_of(tmp_path / rank) for rank in "01"))
        ranks = [psutil.Process(int(text_of(tmp_path / rank))) for rank in "01"]
        assert running.alive() == 3
        running.kill_all()
        assert running.finish(30).returncode == -signal.SIGKILL
    psutil.wait_procs(ranks, timeout=30)
    assert_gone([*(rank.pid for rank in ranks), running.process.pid])


def text_of(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def test_forks_end_with_a_test_process_that_is_killed(tmp_path):
    script = f"from tests.forks import run_python; run_python(['-c', {HANG!r}, {str(tmp_path)!r}])"
    with start_python(["-c", script]) as running:
        running.wait_for(lambda: text_of(tmp_path / "0"))
        running.send_signal(signal.SIGKILL)
        assert running.finish(30).returncode == -signal.SIGKILL
        fork = int(text_of(tmp_path / "0"))
        psutil.wait_procs([psutil.Process(fork)] if psutil.pid_exists(fork) else [], timeout=30)
        assert_gone([fork])


def test_what_was_read_at_the_start_cannot_be_asked_for_later():
    with pytest.raises(AssertionError, match="take run_cli"):
        run_python(["-c", ""], env={"OMP_NUM_THREADS": "2"})
