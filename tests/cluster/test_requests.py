"""What reaches the ranks of other hosts, what they say when they end, and which hosts may be lost."""

import contextlib
import re
import signal
import sys

from engine.checkpoint.manifest import read_manifest, steps
from tests.cluster.network import HOSTS
from tests.cluster.test_hosts import losses, readme_block
from tests.cluster.test_supervised import last, named

RUN = ["train.py", "--recipe", "recipe.yaml", "--deepspeed_config", "ds_configs/zero3_fp32.json", "--data", "data"]
SUPERVISE = [sys.executable, "-m", "tools.supervise"]


def nothing_left(cluster) -> bool:
    return not any(cluster.processes(host, "train.py") for host in HOSTS)


def test_the_first_host_is_lost_and_ctrl_c_reaches_the_others(cluster, shared):
    """The supervisor is on a host without ranks; what is lost is the host of rank 0 and of the master address."""
    output = shared / "run_first_lost"
    (shared / "two_others").write_text("node2 slots=1\nnode3 slots=1\n")
    command = [*SUPERVISE, "--hostfile", "two_others", "--", *RUN, "--output", output.name]
    with cluster.start([*command, "--checkpoint.every_steps", "5"], cwd=shared) as running:
        running.wait_for(lambda: named(output, "checkpoint"), 300)
        cluster.kill("node2")
        running.wait_for(lambda: named(output, "restart") and "loss" in last(output), 300)
        running.send_signal(signal.SIGINT)
        done = running.finish(100)
        assert nothing_left(cluster)
    assert done.returncode == 130, done.stderr
    (restart,) = named(output, "restart")
    assert (restart["reason"], restart["hosts"]) == ("lost node2", ["node3"])
    manifest = read_manifest(steps(output)[0])
    assert manifest.layout.world_size == 1
    assert manifest.state.step == max(losses(output)), "not saved at the request"


RAISES = """
import os, runpy, sys
sys.path.insert(0, os.getcwd())
from engine.run import loop
step = loop.TrainingLoop.step
def failing(self, *given):
    if os.environ["RANK"] == "1" and self.state.step == 6 and not os.path.exists("raised"):
        open("raised", "w").close()
        raise KeyError("of the second host")
    return step(self, *given)
loop.TrainingLoop.step = failing
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""


def test_what_ended_a_rank_of_another_host(cluster, shared):
    """One that raises, then one that is killed, of one run; the sentence has host, rank and what it said last."""
    output = shared / "run_raises"
    (shared / "raising").mkdir()
    (shared / "raising/train.py").write_text(RAISES)
    command = [*SUPERVISE, "--hostfile", "hosts", "--", "raising/train.py", *RUN[1:], "--output", output.name]
    with cluster.start([*command, "--checkpoint.every_steps", "2"], cwd=shared) as running:
        running.wait_for(lambda: named(output, "restart") and "loss" in last(output), 300)
        (rank,) = [p for p in cluster.processes("node2", "--local_rank=0") if "-u" in p.cmdline()[:2]]
        rank.kill()
        running.wait_for(lambda: len(named(output, "restart")) == 2 and "loss" in last(output), 300)
        running.send_signal(signal.SIGTERM)
        done = running.finish(100)
        assert nothing_left(cluster)
    assert done.returncode == 75, done.stderr
    raised, killed = (restart["reason"] for restart in named(output, "restart"))
    assert raised == "exit code 1: a collective failed: node2 (rank 1) ended: KeyError: 'of the second host'"
    assert re.match(r"killed: a collective failed: node2 \(rank 1\) has not arrived .*killed", killed)


def test_torchrun_on_two_hosts_is_started_again_by_a_supervisor_on_each(cluster, shared):
    output = shared / "run_torchrun_supervised"
    command = readme_block("torchrun --nnodes 2")
    command[-1] = command[-1].replace("torchrun", "exec python -m tools.supervise -- torchrun", 1)
    command[-1] = command[-1].replace("--output run", f"--output {output.name} --checkpoint.every_steps 5")
    with contextlib.ExitStack() as both:
        started = [both.enter_context(cluster.start(command, cwd=shared, host=host)) for host in ("node2", "node1")]
        started[0].wait_for(lambda: named(output, "checkpoint"), 300)
        (rank,) = [p for p in cluster.processes("node2", "train.py") if "train.py" in p.cmdline()[:3][-1]]
        rank.kill()
        started[0].wait_for(lambda: named(output, "restart") and "loss" in last(output), 300)
        for running in started:
            running.send_signal(signal.SIGTERM)
        ended = [running.finish(100) for running in started]
    assert [done.returncode for done in ended] == [75, 75], [done.stderr for done in ended]
    assert "supervisor: restart 1 of at most 10" in ended[0].stderr
    (restart,) = named(output, "restart")
    assert re.search(r"^killed: node2 \(rank 1\)$|a collective failed: node2 \(rank 1\)", restart["reason"])
    assert sorted(losses(output)) == list(range(1, max(losses(output)) + 1))
