"""Two hosts of which one is lost: the part of `bench.faults` for which network namespaces stand (`tests/cluster/network.py`)."""

import contextlib
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from bench.fault_runs import END_SECONDS, FLAGS, LONGEST_SECONDS, ROOT, STEPS, distance, last_step
from tests.cluster.network import Cluster, missing_device

HOST_FAULTS = {"host cut off": Cluster.cut, "host killed": Cluster.kill}
KEPT, LOST = "node1", "node2"
NOTICE = {"PDSH_SSH_ARGS_APPEND": "-o ServerAliveInterval=5"}
"""As the README says."""
CLOSENESS = 1e-5


@contextlib.contextmanager
def hosts() -> Iterator[Cluster | None]:
    """None, and a sentence, where this machine cannot have them."""
    if reason := missing_device():
        print(f"lost hosts are left out: {reason}")
        yield None
        return
    with Cluster() as cluster:
        yield cluster


def hit_host(cluster: Cluster, folder: Path, fault: str, chance: random.Random) -> tuple[bool, str] | None:
    """One moment: whether all was as it has to be, and its line; None: it came too late."""
    place = folder / "hosts"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    run, script = place / "run", str(ROOT / "train.py")
    (place / "hostfile").write_text(f"{KEPT} slots=1\n{LOST} slots=1\n")
    (place / ".deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
    flags = [script, *FLAGS, "--data", str(folder / "data"), "--output", str(run)]
    step, delay = chance.randrange(1, STEPS - 1), chance.uniform(0, 0.3)
    with cluster.start(["deepspeed", "--hostfile", "hostfile", *flags], cwd=place, env=NOTICE) as running:
        running.wait_for(lambda: last_step(run) >= step, LONGEST_SECONDS)
        time.sleep(delay)
        words, began = f"at step {last_step(run)}", time.monotonic()
        HOST_FAULTS[fault](cluster, LOST)
        code = running.process.wait(LONGEST_SECONDS)
        deadline = time.monotonic() + END_SECONDS
        while (left := _ranks(cluster, script)) and time.monotonic() < deadline:
            time.sleep(0.1)
        words += f", all had ended after {time.monotonic() - began:.0f} s"
    if code == 0:
        cluster.restore_all()
        return None
    done = cluster.run(["deepspeed", "--num_gpus", "1", *flags], cwd=place, timeout=LONGEST_SECONDS)
    cluster.restore_all()
    apart = distance(run, folder / "whole") if done.returncode == 0 else float("inf")
    good = not left and apart < CLOSENESS
    verdict = f"within {apart:.0e}" if good else f"DIFFERS: {apart:.0e}, code {done.returncode}, {done.stderr[-400:]}"
    return good, f"{words:40s}{2:9d}{left:10d}   {verdict}"


def _ranks(cluster: Cluster, script: str) -> int:
    """Those, and their launchers, that are left on both hosts."""
    return sum(len(cluster.processes(host, script)) for host in (KEPT, LOST))
