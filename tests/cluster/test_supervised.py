"""A supervised run over three hosts goes on without one that is lost, and takes it back."""

import signal
import sys

import pytest

from tests.cluster.network import HOSTS
from tests.cluster.test_hosts import events, losses, undivided  # noqa: F401
from training.records import read_records


def named(output, event: str) -> list[dict]:
    return (
        [record for record in events(output) if record["event"] == event] if (output / "metrics.jsonl").exists() else []
    )


def test_a_host_is_lost_and_comes_back(undivided, cluster, shared):  # noqa: F811
    output = shared / "run_supervised"
    (shared / "three_hosts").write_text("node1 slots=2\nnode2 slots=1\nnode3 slots=1\n")
    command = [sys.executable, "-m", "tools.supervise", "--hostfile", "three_hosts", "--", "train.py", "--recipe"]
    command += ["recipe.yaml", "--deepspeed_config", "ds_configs/zero3_fp32.json", "--data", "data"]
    command += ["--output", output.name, "--checkpoint.every_steps", "5", "--training.micro_batch_samples", "1"]
    (shared / "elsewhere").mkdir()
    (shared / "elsewhere/train.py").write_text("import time\ntime.sleep(1000)\n")
    of_same_name = [sys.executable, "train.py", "--local_rank=0", "--output", output.name]
    start = cluster.start
    with start(of_same_name, cwd=shared / "elsewhere", host="node2") as other, start(command, cwd=shared) as running:
        running.wait_for(lambda: len(named(output, "checkpoint")) >= 1, 200)
        cluster.kill("node3")
        running.wait_for(lambda: named(output, "restart") and "loss" in last(output), 200)
        (restart,) = named(output, "restart")
        assert restart["reason"] == "lost node3"
        assert restart["hosts"] == ["node1", "node2"]
        cluster.restore("node3")
        running.wait_for(lambda: len(named(output, "restart")) == 2 and "loss" in last(output), 200)
        assert named(output, "restart")[1]["reason"] == "node3 is back"
        running.send_signal(signal.SIGTERM)
        done = running.finish(100)
        (left,) = [process for host in HOSTS for process in cluster.processes(host, "train.py")]
        assert left.pid == other.process.pid, "a run of the same name in another folder is left alone"
    assert done.returncode == 75, done.stderr
    assert "written_by=ZeRO-3 on 4 ranks" in done.stdout
    assert "written_by=ZeRO-3 on 2 ranks" in done.stdout  # three would not divide the batch of eight rows
    found = losses(output)
    assert sorted(found) == list(range(1, max(found) + 1))
    assert {step: found[step] for step in undivided} == pytest.approx(undivided, rel=1e-5)


def last(output) -> dict:
    return read_records(output / "metrics.jsonl")[-1]
