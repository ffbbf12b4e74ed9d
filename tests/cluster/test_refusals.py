"""What cannot work is refused with the reason: by train.py, by the doctor, by DeepSpeed itself."""

import shutil

import pytest

from tests.processes import CODE, ROOT, run_cli


def test_a_missing_hostfile_is_no_local_run(tmp_path):
    arguments = [word for name in ("recipe", "deepspeed_config", "data", "output") for word in (f"--{name}", "absent")]
    done = run_cli(
        ["deepspeed", "--hostfile", "absent_hosts", "--num_gpus", "1", ROOT / "train.py", *arguments], cwd=tmp_path
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("--hostfile absent_hosts does not exist, so `deepspeed` started this machine alone") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("hostfile", "reason"),
    [
        ("node1 slots=1\nnode1 slots=1\n", "multiple entries for node1"),
        ("node1: 8\n", "bad entry: node1: 8"),
        ("node9 slots=1\nnode1 slots=1\n", "host=node9 was not reachable"),
    ],
)
def test_deepspeed_starts_nothing_with_a_bad_hostfile(cluster, tmp_path, hostfile, reason):
    """DeepSpeed's own refusals, on which the README counts."""
    (tmp_path / "hosts").write_text(hostfile)
    (tmp_path / "script.py").write_text("print('a rank runs')")
    done = cluster.run(["deepspeed", "--hostfile", "hosts", "script.py"], cwd=tmp_path)
    assert done.returncode != 0
    assert reason in done.stderr
    assert "a rank runs" not in done.stdout


def test_the_ranks_say_which_host_they_miss(cluster, shared):
    """DeepSpeed tries the first host only; nothing trains, and `launch.rendezvous` ends the wait."""
    (shared / "far_hosts").write_text("node1 slots=1\nnode9 slots=1\n")
    arguments = ["--recipe", "recipe.yaml", "--deepspeed_config", "ds_configs/zero3_fp32.json", "--data", "data"]
    command = ["deepspeed", "--hostfile", "far_hosts", "train.py", *arguments, "--output", "run_far"]
    with cluster.start(command, cwd=shared) as running:
        running.wait_for(lambda: "node1: waiting for node9 (rank 1)" in running.stderr, timeout=200)
        assert "node9: ssh: Could not resolve hostname node9" in running.stderr + running.stdout
    assert not (shared / "run_far").exists()


def test_a_host_without_the_data_ends_the_others(cluster, shared):
    """At once, and not after the minutes that ranks wait for one another."""
    (cluster.folder / "only_node1/packed").symlink_to(shared / "data")
    arguments = ["--recipe", "recipe.yaml", "--deepspeed_config", "ds_configs/zero3_fp32.json"]
    arguments += ["--data", str(cluster.folder / "only_node1/packed"), "--output", "run_nowhere"]
    done = cluster.run(["deepspeed", "--hostfile", "hosts", "train.py", *arguments], cwd=shared, timeout=150)
    assert done.returncode, done.stdout + done.stderr
    reason = f"{cluster.folder}/only_node1/packed is not a prepared data set: it has no manifest.json"
    assert f"node2: error: {reason}" in done.stderr
    assert f"node1: error: node2 (rank 1) ended before the ranks had met: {reason}" in done.stderr
    assert not (shared / "run_nowhere/metrics.jsonl").exists()


def test_the_doctor_names_every_problem_of_every_host(cluster):
    """Started in a folder that is another one, with other code, on node2."""
    folder, other = cluster.folder / "differs", cluster.folder / "differs_node2"
    for name in CODE:
        for place in (folder, other):
            source = ROOT / name
            shutil.copytree(source, place / name) if source.is_dir() else shutil.copy(source, place / name)
    (other / "engine/step.py").write_text("")
    (other / "model/llama.py").unlink()
    (folder / "hosts").write_text("node1 slots=1\nnode2 slots=1\n10.77.0.2 slots=1\nnode9 slots=1\nnode2 slots=2\n")
    (folder / ".deepspeed_env").write_text("GLOO_SOCKET_IFNAME=ib0\n\n")
    environment = {"PYTHONPATH": str(folder), "WANDB_API_KEY": "secret"}
    command = ["python", "-m", "tools.doctor", "--hostfile", "hosts"]
    done = cluster.run(command, cwd=folder, env=environment, timeout=200)
    assert done.returncode == 2, done.stdout + done.stderr
    for part in (
        "hosts, line 5: node2 is already in line 2",
        "deepspeed_env, line 2: an empty line makes `deepspeed` crash",
        "node1: GLOO_SOCKET_IFNAME=ib0 but its network interfaces are eth0, lo",
        f"node2: other code in {folder}: engine/step.py, model/llama.py",
        f"node2: its {folder} is another folder",
        "node9: `ssh node9` must work without a password or a question, but says: ssh: Could not resolve hostname node9",
        "node2 and 10.77.0.2 are one machine",
    ):
        assert f"problem: {part}" in done.stdout.replace(".deepspeed_env", "deepspeed_env"), done.stdout
    assert "node1: other code" not in done.stdout
    assert "WANDB_API_KEY" in done.stdout
    assert "secret" not in done.stdout
    assert "Traceback" not in done.stderr
    assert not list(folder.glob(".longform-doctor-*"))
