"""The process helpers: values come back by rank, failures carry the right traceback, nothing survives."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.processes import MARK, clean_environment, run_cli, start_cli
from tests.ranks import RankError, RankPool, run_ranks


def run_square(offset: int) -> tuple[int, int, dict[str, str]]:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return rank**2 + offset, world_size, dict(os.environ)


def run_all_reduce() -> float:
    import torch
    import torch.distributed as dist

    total = torch.tensor(float(dist.get_rank() + 1))
    dist.all_reduce(total)
    return total.item()


def run_failure_beside_a_collective(folder: str) -> None:
    import torch
    import torch.distributed as dist

    Path(folder, str(dist.get_rank())).write_text(str(os.getpid()))
    print("before the failure")
    if dist.get_rank() == 1:
        raise KeyError("the reason is here")
    dist.all_reduce(torch.zeros(1))


def run_hang(folder: str) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    Path(folder, os.environ["RANK"]).write_text(str(child.pid))
    time.sleep(600)


def run_death() -> None:
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def run_elsewhere(folder: str) -> None:
    os.chdir(folder)
    os.environ["ABSENT"] = os.environ.pop("WANDB_MODE")


def run_unpicklable() -> object:
    return lambda: None


def assert_gone(pids: list[int]) -> None:
    """Or as good as: what was killed a moment ago may still be on its way out of a busy processor."""

    def there() -> list[int]:
        return [
            process.pid for process in psutil.process_iter(["status"]) if process.info["status"] != psutil.STATUS_ZOMBIE
        ]

    deadline = time.monotonic() + 5
    while {*pids} & {*there()} and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not {*pids} & {*there()}


def test_values_come_back_in_rank_order(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    results = run_ranks(run_square, 3, 10, env={"WANDB_MODE": None, "EXTRA": "1"})
    assert [value for value, *_ in results] == [10, 11, 14]
    for rank, (_, world_size, environment) in enumerate(results):
        assert world_size == 3
        assert environment["LOCAL_RANK"] == str(rank)
        assert environment["MASTER_PORT"] != "1"
        assert environment["DS_ACCELERATOR"] == "cpu"
        assert environment["EXTRA"] == "1"
        assert not {"WANDB_API_KEY", "WANDB_MODE"} & environment.keys()


def test_process_group():
    assert run_ranks("tests.test_processes:run_all_reduce", 2, process_group=True) == [3.0, 3.0]


def test_one_failed_rank_fails_the_call_with_its_traceback(tmp_path):
    began = time.monotonic()
    with pytest.raises(RankError) as raised:
        run_ranks(run_failure_beside_a_collective, 2, str(tmp_path), process_group=True)
    message = str(raised.value)
    assert "KeyError: 'the reason is here'" in message
    assert "run_failure_beside_a_collective" in message
    assert "before the failure" in message
    assert message.index("rank 1 of 2") < message.index("KeyError")
    assert time.monotonic() - began < 60  # the healthy rank, waiting for its peer, was not waited for
    assert_gone([int(path.read_text()) for path in tmp_path.iterdir()])


def test_timeout_shows_stacks_and_leaves_no_orphan(tmp_path):
    with pytest.raises(RankError, match="no end after 3 s") as raised:
        run_ranks(run_hang, 2, str(tmp_path), timeout=3)
    assert "in run_hang" in str(raised.value)
    children = [int(path.read_text()) for path in tmp_path.iterdir()]
    assert len(children) == 2
    assert_gone(children)


def test_a_killed_rank_is_reported():
    with pytest.raises(RankError, match="rank 1: exit code -9"):
        run_ranks(run_death, 2, timeout=30)


def test_a_result_that_cannot_be_pickled_is_a_failure():
    with pytest.raises(RankError, match="pickle"):
        run_ranks(run_unpicklable, 1)


def test_ranks_stay_until_a_call_fails():
    with RankPool() as pool:
        pids = pool.call(2, os.getpid)
        assert pool.call(2, os.getpid) == pids
        with pytest.raises(RankError, match="rank 1: exit code -9"):
            pool.call(2, run_death)
        assert_gone(pids)
        fresh = pool.call(2, os.getpid)
        assert pool.call(2, os.getpid) == fresh
        assert not set(fresh) & set(pids)
        pool.dismiss()
    assert_gone(fresh)


def test_ranks_end_with_a_test_process_that_is_killed(tmp_path):
    script = f"from tests.test_processes import *; run_ranks(run_hang, 2, {str(tmp_path)!r})"
    with start_cli(["python", "-c", script]) as running:
        running.wait_for(lambda: len([path for path in tmp_path.iterdir() if path.read_text()]) == 2)
        children = [psutil.Process(int(path.read_text())) for path in tmp_path.iterdir()]
        ranks = [child.ppid() for child in children]
        running.send_signal(signal.SIGKILL)
        assert running.finish(30).returncode == -signal.SIGKILL
    try:
        psutil.wait_procs([psutil.Process(pid) for pid in ranks if psutil.pid_exists(pid)], timeout=30)
        assert_gone(ranks)
    finally:
        for child in children:
            child.kill()


def test_a_call_leaves_no_variable_and_no_folder_to_the_next(tmp_path):
    with RankPool() as pool:
        before = pool.call(1, run_square, 0), pool.call(1, os.getcwd)
        pool.call(1, run_elsewhere, str(tmp_path))
        assert (pool.call(1, run_square, 0), pool.call(1, os.getcwd)) == before


def test_run_cli_returns_code_and_both_streams():
    script = "import sys; print(sys.stdin.read()); print('bad', file=sys.stderr); sys.exit(7)"
    done = run_cli(["python", "-c", script], stdin="given")
    assert (done.returncode, done.stdout, done.stderr) == (7, "given\n", "bad\n")


def test_run_cli_uses_this_interpreter_and_repository():
    done = run_cli(["python", "-c", "import sys, tests.launch; print(sys.prefix)"])
    assert done.stdout.strip() == sys.prefix, done.stderr


def test_run_cli_timeout_kills_the_whole_tree(tmp_path):
    script = f"from tests.test_processes import run_hang; run_hang({str(tmp_path)!r})"
    with pytest.raises(TimeoutError, match="in run_hang"):
        run_cli(["python", "-c", script], env={"RANK": "0"}, timeout=3)
    assert_gone([int((tmp_path / "0").read_text())])


def test_start_cli_reads_output_while_it_runs_and_signals():
    script = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(3)); print('ready'); time.sleep(600)"
    with start_cli(["python", "-c", script]) as running:
        running.wait_for(lambda: "ready" in running.stdout)
        running.send_signal(signal.SIGTERM)
        assert running.finish(30).returncode == 3
    with (
        start_cli(["python", "-c", "raise SystemExit('early')"]) as running,
        pytest.raises(TimeoutError, match="early"),
    ):
        running.wait_for(lambda: False)


def test_clean_environment_removes_and_replaces():
    environment = clean_environment({"DS_ACCELERATOR": "cuda", "WANDB_MODE": None, "ABSENT": None})
    assert environment["DS_ACCELERATOR"] == "cuda"
    assert not {"WANDB_MODE", "ABSENT", MARK} & environment.keys()
