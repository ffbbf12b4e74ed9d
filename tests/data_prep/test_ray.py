"""A build on a Ray cluster of two nodes on this machine, whatever of it dies."""

import os
import subprocess
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from data_prep.encode import Work
from data_prep.ledger import Ledger
from tests.data_prep.builds import arguments, command, contents, failure, run
from tests.data_prep.texts import write_lines
from tests.processes import free_port

ray_engine = pytest.importorskip("data_prep.units.ray", reason="Ray (requirements-cluster.txt) is not installed")
NOTICED_SOON = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 300, "health_check_failure_threshold": 3}
NODE = {"num_cpus": 1, "object_store_memory": 80_000_000, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    started = Cluster(initialize_head=True, head_node_args=NODE | {"_system_config": NOTICED_SOON})
    yield started
    started.shutdown()


def on(cluster, prose, tokenizer_folder, output) -> tuple:
    return arguments(prose, tokenizer_folder, output, "--engine", "ray", "--ray-address", cluster.address)


def workers_of(cluster) -> list[psutil.Process]:
    """Processes of the cluster's nodes that encode units."""
    raylets = [node.all_processes["raylet"][0].process.pid for node in cluster.list_all_nodes()]
    names = {"ray::_run_unit"}
    found = []
    for child in (child for pid in raylets for child in psutil.Process(pid).children(recursive=True)):
        with suppress(psutil.Error):
            found += [child] if names & set(child.cmdline()) else []
    return found


def test_driver_worker_and_node_die(cluster, prose, tokenizer_folder, reference, tmp_path):
    output, units = tmp_path / "data", len(list((reference / "tokens").glob("unit-*.json")))
    words, settings = command("build", *on(cluster, prose, tokenizer_folder, output))
    lost = cluster.add_node(**NODE)

    def wait_for(process: subprocess.Popen, more_than: int) -> dict[Path, int]:
        while process.poll() is None:
            finished = list((output / "tokens").glob("unit-*.json"))
            if len(finished) > more_than:
                assert len(finished) < units
                return {path: path.stat().st_mtime_ns for path in finished}
            time.sleep(0.001)
        raise AssertionError(process.communicate())

    driver = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings)
    kept = wait_for(driver, 2)
    driver.kill()
    driver.communicate()
    again = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings)
    while not (working := workers_of(cluster)) and again.poll() is None:
        time.sleep(0.01)
    working[0].kill()
    wait_for(again, len(kept) + 3)
    cluster.remove_node(lost, allow_graceful=False)
    out, err = again.communicate()
    assert again.returncode == 0, out + err
    assert f"{units} units of work, " in err
    assert kept.items() <= {path: path.stat().st_mtime_ns for path in kept}.items()
    assert contents(output) == contents(reference)
    assert not list(output.rglob("*.tmp"))


def test_a_node_with_another_version_is_named(cluster, prose, tokenizer_folder, tmp_path):
    (tmp_path / "xxhash-0.0.1.dist-info").mkdir()
    (tmp_path / "xxhash-0.0.1.dist-info" / "METADATA").write_text("Name: xxhash\nVersion: 0.0.1\n")
    other = cluster.add_node(**NODE, env_vars={"PYTHONPATH": str(tmp_path)})
    try:
        sentence = failure(run("build", *on(cluster, prose, tokenizer_folder, tmp_path / "data")))
    finally:
        cluster.remove_node(other)
    assert "has xxhash 0.0.1 and not" in sentence
    assert "install the same requirements.txt on all nodes" in sentence


def test_bad_input_is_named_by_its_place(cluster, tokenizer_folder, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "one"}, {"text": 1}])
    sentence = failure(run("build", *on(cluster, path, tokenizer_folder, tmp_path / "data")))
    assert f"{path} line 2: field 'text' is not text" in sentence
    assert '"failed": true' in (tmp_path / "data" / "plan.json").read_text()


# --- what needs no cluster --------------------------------------------------------------------------------------------


def test_no_cluster_at_an_address(prose, tokenizer_folder, tmp_path, monkeypatch):
    def refusal(address: str) -> str:
        with pytest.raises(ValueError, match=f"--ray-address {address}: ") as caught:
            ray_engine._connect(address)
        return str(caught.value)

    assert "Connection refused" in refusal(f"127.0.0.1:{free_port()}")
    assert "write HOST:PORT" in refusal("nonsense")
    assert "on a node of the cluster" in refusal("ray://127.0.0.1:10001")
    monkeypatch.setattr(ray_engine, "CONNECT_SECONDS", 3.0)
    with ray_engine.socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=listener.accept, daemon=True).start()
        assert "gave no answer of Ray's" in refusal(f"127.0.0.1:{listener.getsockname()[1]}")
    words = arguments(prose, tokenizer_folder, tmp_path / "data")
    assert "needs --engine ray" in failure(run("build", *words, "--ray-address", "127.0.0.1:6379"))
    assert "choose one" in failure(run("build", *words, "--engine", "ray", "--part", "1/2"))


def test_without_ray_the_file_to_install_from_is_named(prose, tokenizer_folder, tmp_path):
    (tmp_path / "ray.py").write_text("raise ImportError")
    words = arguments(prose, tokenizer_folder, tmp_path / "data", "--engine", "ray")
    assert "pip install -r requirements-cluster.txt" in failure(run("build", *words, PYTHONPATH=str(tmp_path)))


def test_folders_that_are_not_shared(tmp_path, monkeypatch):
    work = Work(tmp_path / "tokens", tmp_path, "plan", [], "text", None, 0, "fail", None)
    monkeypatch.setattr(ray_engine, "SEEN_SECONDS", 0)
    with pytest.raises(ValueError, match="tokens is another folder on a node of the cluster"):
        ray_engine._wait_for(work, Ledger(unit=0, plan_sha256="plan", input_sha256="", sha256="", file_bytes=1))
    with pytest.raises(ValueError, match=r"does not see .*tokens: choose an --output on a file system that all nodes"):
        ray_engine._run_unit(work, None, ray_engine.versions(work))
