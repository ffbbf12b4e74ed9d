"""The hosts that all tests here run on: what is done to one of them is so, for the others it is not, and it can be undone."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.cluster.network import HOSTS, HOSTS_FILES, missing_device
from tests.processes import ROOT


def reached(cluster, host: str, origin: str = "node1") -> bool:
    done = cluster.run(["ssh", "-o", "ConnectTimeout=2", host, "hostname"], cwd=cluster.folder, host=origin)
    return done.stdout == f"{host}\n"


def test_every_host_reaches_every_other(cluster):
    for origin in HOSTS:
        done = cluster.run(["pdsh", "-R", "ssh", "-w", ",".join(HOSTS), "hostname"], cwd=cluster.folder, host=origin)
        assert sorted(done.stdout.splitlines()) == [f"{host}: {host}" for host in HOSTS], done.stderr


def test_a_host_is_cut_off_and_comes_back(cluster):
    cluster.cut("node2")
    assert not reached(cluster, "node2")
    assert not reached(cluster, "node3", origin="node2")
    assert reached(cluster, "node2", origin="node2")
    assert reached(cluster, "node3")
    cluster.restore("node2")
    assert reached(cluster, "node2")


def test_a_link_is_slowed(cluster):
    """A megabyte needs a second each way at eight megabits, less what the bucket holds."""
    read, written = "head -c 1000000 /dev/zero", "cat >/dev/null"
    cluster.slow("node2", mbit=8)
    for command in (f"ssh node2 {read} | {written}", f"{read} | ssh node2 '{written}'"):
        began = time.monotonic()
        assert cluster.run(["bash", "-c", command], cwd=cluster.folder).returncode == 0
        assert time.monotonic() - began > 0.9
    cluster.restore("node2")
    shown = subprocess.run(["tc", "-n", cluster.namespace("node2"), "qdisc", "show"], capture_output=True, text=True)
    assert shown.stdout
    assert "tbf" not in shown.stdout


def test_a_killed_host_tells_nobody_and_boots(cluster):
    with cluster.start(["ssh", "node3", "sleep", "1234"], cwd=cluster.folder) as session:
        session.wait_for(lambda: cluster.processes("node3", "1234"))
        cluster.kill("node3")
        assert not cluster.processes("node3", "1234")
        time.sleep(0.5)
        assert session.process.poll() is None, "the connection was closed"
    assert not reached(cluster, "node3")
    assert reached(cluster, "node2")
    cluster.restore_all()
    assert reached(cluster, "node3")


def test_nothing_is_left_of_a_killed_test_run(tmp_path):
    if reason := missing_device():
        pytest.skip(reason)
    script = (
        "import time; from tests.cluster.network import Cluster\n"
        "with Cluster() as c:\n print(c.folder, flush=True)\n time.sleep(600)"
    )
    user = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    folder = Path(user.stdout.readline().strip())
    keeper = psutil.Process(int(folder.name.rpartition("-")[2]))
    assert folder.is_dir()
    assert (HOSTS_FILES / f"{folder.name}-node1").is_dir()
    user.send_signal(signal.SIGKILL)
    user.communicate()
    psutil.wait_procs([keeper], timeout=30)
    assert not folder.exists()
    assert not list(HOSTS_FILES.glob(f"{folder.name}-*"))
    assert folder.name not in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
