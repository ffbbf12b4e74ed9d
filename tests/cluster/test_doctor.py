"""The doctor on three hosts that are as they should be, but for a slow link, and on hosts that do not share a folder."""

import json

import yaml

ARGUMENTS = ["--recipe", "three.yaml", "--deepspeed_config", "ds_configs/zero3_fp32.json", "--data", "data"]


def test_a_slow_link_is_noted_and_what_the_run_needs_is_said(cluster, shared):
    (shared / "three_hosts").write_text("".join(f"node{n} slots=1\n" for n in (1, 2, 3)))
    recipe = yaml.safe_load((shared / "recipe.yaml").read_text())
    recipe["training"]["global_batch_tokens"] = 768  # of which each of three ranks has its share
    (shared / "three.yaml").write_text(yaml.safe_dump(recipe))
    cluster.slow("node2", mbit=40)
    command = ["python", "-m", "tools.doctor", "--hostfile", "three_hosts", *ARGUMENTS, "--output", "run_new", "--json"]
    done = cluster.run(command, cwd=shared, env={"PYTHONPATH": str(shared)}, timeout=200)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert said["problems"] == []
    found = said["facts"]["bandwidth"]
    assert (found["backend"], sorted(found["pairs"])) == ("gloo", ["node1 - node2", "node1 - node3", "node2 - node3"])
    limit = 40e6 / 8
    for pair, rate in found["pairs"].items():
        assert (rate < 1.1 * limit) == ("node2" in pair), found
    assert found["all_reduce"] < 2 * limit
    (slow,) = [note for note in said["notes"] if note.startswith("node2: exchanges ")]
    assert "MB/s at most with the others" in slow
    assert any("`deepspeed` would not notice that node1, node2, node3 is lost" in note for note in said["notes"])
    run = said["facts"]["run"]
    assert run["ranks"] == 3
    assert run["rank_memory"]["weights"] > 0
    assert 0 < run["checkpoint_bytes"] < run["disk_needed"] < run["disk_free"]
    assert not (shared / "run_new").exists()
    assert not list(shared.glob(".longform-doctor-*"))


def test_folders_of_the_run_that_are_not_shared(cluster, shared):
    """Of `only_node1` every host but node1 sees an empty one of its own."""
    own = cluster.folder / "only_node1"
    (own / "data").mkdir()
    (own / "data" / "manifest.json").write_text("{}")
    command = ["python", "-m", "tools.doctor", "--hostfile", "hosts", "--data", own / "data", "--output", own / "run"]
    done = cluster.run(command, cwd=shared, env={"PYTHONPATH": str(shared)}, timeout=200)
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"problem: node2: its {own} is another folder; data and --output must be on a file system" in done.stdout
    assert "problem: node2: no data set in the folder of --data" in done.stdout
    assert "node1: its" not in done.stdout
    assert "note: how fast the hosts exchange data is measured once there is no problem" in done.stdout
