"""What reaches the ranks of other hosts, what they say when they end, and which hosts may be lost."""

import signal
import sys

from engine.checkpoint.manifest import read_manifest, steps
from tests.cluster.network import HOSTS
from tests.cluster.test_hosts import losses
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
