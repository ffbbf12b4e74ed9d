"""What the README says of several hosts, run on two: its own commands, over real ssh, pdsh and TCP between addresses."""

import contextlib
import json
import re
import time
from pathlib import Path

import pytest

from engine.checkpoint.manifest import read_manifest, steps
from tests.processes import free_port, run_cli
from tests.test_readme import README
from training.records import read_records


def readme_block(words: str, *flags: str) -> list[str]:
    """The README's commands that contain these words, with one slot a host, our recipe, and float32."""
    (script,) = [block for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if words in block]
    for theirs, ours in {
        "=8": "=1",
        "_gpus 8": "_gpus 1",
        "_node 8": "_node 1",
        "zero3.json": "zero3_fp32.json",
    }.items():
        script = script.replace(theirs, ours)
    script = re.sub(r"recipes/[\w-]+\.yaml", "recipe.yaml", script)
    script, changed = re.subn(r"(--output run)\b", " ".join([r"\1", *flags]), script)
    assert changed == 1
    return ["bash", "-euc", script]


def losses(output: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_records(output / "metrics.jsonl") if "loss" in r}


def events(output: Path) -> list[dict]:
    return [record for record in read_records(output / "metrics.jsonl") if "event" in record]


@pytest.fixture(scope="module")
def stopped(cluster, shared):
    """The README's launch with a hostfile, after 8 steps ended by a SIGTERM to `deepspeed`; its output and its losses."""
    output = shared / "run"
    with cluster.start(readme_block("--hostfile hosts train.py"), cwd=shared) as running:
        running.wait_for(lambda: (output / "metrics.jsonl").exists() and len(losses(output)) >= 8, timeout=240)
        (launcher,) = cluster.processes("node1", "--hostfile")
        launcher.terminate()
        done = running.finish()
        deadline = time.monotonic() + 60
        while any(cluster.processes(host, "train.py") for host in ("node1", "node2")):
            assert time.monotonic() < deadline, "ranks outlive the launcher"
            time.sleep(0.1)
    return done, losses(output)


@pytest.fixture(scope="module")
def undivided(shared) -> dict[int, float]:
    """The losses of the same recipe on two ranks of this machine."""
    launch = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "train.py", "--recipe", "recipe.yaml"]
    rest = ["--deepspeed_config", "ds_configs/zero3_fp32.json", "--data", "data", "--output", "run_here"]
    here = run_cli([*launch, *rest, "--training.max_steps", "8"], cwd=shared, timeout=200)
    assert here.returncode == 0, here.stdout + here.stderr
    return losses(shared / "run_here")


def test_two_hosts_train_as_one(stopped, undivided):
    done, across = stopped
    assert "every host is ready for the launch" in done.stdout
    assert re.search(r"^node1: step +8/100000 \| loss", done.stdout, re.MULTILINE), done.stdout + done.stderr
    assert {step: across[step] for step in range(1, 9)} == pytest.approx(undivided, rel=1e-5)


def test_stopped_on_all_hosts_and_continued_on_one(stopped, cluster, shared):
    output = shared / "run"
    newest = steps(output)[0]
    assert [event["event"] for event in events(output)][-1] == "stop", stopped[0].stdout + stopped[0].stderr
    assert read_manifest(newest).layout.world_size == 2
    last = read_manifest(newest).state.step
    assert last == max(losses(output))
    of_one_node = "--num_gpus 8 train.py --recipe recipes/llama-1b.yaml --deepspeed_config"
    command = readme_block(of_one_node, "--training.max_steps", str(last + 2))
    done = cluster.run(command, cwd=shared, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "written_by=ZeRO-3 on 2 ranks" in done.stdout
    assert sorted(losses(output)) == list(range(1, last + 3))


def test_a_host_that_is_cut_off_is_named_and_the_other_goes_on(cluster, shared):
    """Its link is down and nobody says so: no connection is closed."""
    output = shared / "run_cut"
    command = readme_block("--hostfile hosts train.py", "--checkpoint.every_steps", "5")
    command[-1] = command[-1].replace("--output run", "--output run_cut")
    with cluster.start(command, cwd=shared) as running:
        running.wait_for(
            lambda: (output / "metrics.jsonl").exists() and max(losses(output), default=0) >= 8, timeout=240
        )
        cluster.cut("node2")
        done = running.finish(90)
        before = losses(output)
        assert done.returncode not in (0, 2, 75), done.stdout + done.stderr
        assert re.search(
            r"^node1: error: a collective failed: node2 \(rank 1\) has not arrived .* or cut off$",
            done.stderr,
            re.MULTILINE,
        ), done.stderr
        assert "Traceback" not in done.stderr
        deadline = time.monotonic() + 60
        while any(cluster.processes(host, "train.py") for host in ("node1", "node2")):
            assert time.monotonic() < deadline, "ranks are left over"
            time.sleep(0.1)
    newest = read_manifest(steps(output)[0]).state.step
    assert newest >= max(before) - 5
    rest = ["--data", "data", "--output", "run_cut", "--training.max_steps", str(newest + 5)]
    command = ["deepspeed", "--num_gpus", "1", "train.py", "--recipe", "recipe.yaml", *rest]
    done = cluster.run([*command, "--deepspeed_config", "ds_configs/zero3_fp32.json"], cwd=shared, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    after = losses(output)
    assert sorted(after) == list(range(1, newest + 6))
    assert len(before) > newest, "no step was done twice"
    assert {step: after[step] for step in before} == pytest.approx(before, rel=1e-5)


def test_torchrun_on_both_hosts(undivided, cluster, shared):
    output, command = shared / "run_torchrun", readme_block("torchrun --nnodes 2", "--training.max_steps", "3")
    command[-1] = command[-1].replace("--output run", "--output run_torchrun")
    with contextlib.ExitStack() as both:
        started = [both.enter_context(cluster.start(command, cwd=shared, host=host)) for host in ("node2", "node1")]
        for running in started:
            done = running.finish(200)
            assert done.returncode == 0, done.stdout + done.stderr
    assert read_manifest(steps(output)[0]).layout.world_size == 2
    assert losses(output) == pytest.approx({step: undivided[step] for step in (1, 2, 3)}, rel=1e-5)


def test_pipeline_across_hosts_and_tensor_parallelism_within(undivided, cluster, shared):
    """Two ranks on each host, which share its layers by tensors, give the losses of the undivided model."""
    (shared / "hosts_of_two").write_text("".join(f"node{n} slots=2\n" for n in (1, 2)))
    command = ["deepspeed", "--hostfile", "hosts_of_two", "train.py", "--recipe", "recipe.yaml", "--data", "data"]
    command += ["--deepspeed_config", "ds_configs/pipeline_fp32.json", "--pipeline_stages", "2", "--tensor", "2"]
    output = shared / "run_pipeline"
    done = cluster.run([*command, "--output", str(output), "--training.max_steps", "4"], cwd=shared, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(output) == pytest.approx({step: undivided[step] for step in range(1, 5)}, rel=1e-5)
    assert "across hosts" not in done.stdout
    layout = json.loads((output / "run.json").read_text())["layout"]
    assert {key: layout[key] for key in ("world_size", "pipeline", "tensor")} == {
        "world_size": 4,
        "pipeline": 2,
        "tensor": 2,
    }


def test_environment_and_exit_code_pass_between_the_hosts(cluster, shared):
    folder = shared / "environment"
    folder.mkdir()
    (folder / ".deepspeed_env").write_text("GIVEN=with spaces, = and 'quotes'\nOMP_NUM_THREADS=1\n")
    (folder / "rank.py").write_text(
        "import json, os, socket, sys\n"
        "names = ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'GIVEN', 'KEPT')\n"
        "print(json.dumps({'host': socket.gethostname()} | {name: os.environ.get(name) for name in names}))\n"
        "sys.exit(7 * int(os.environ['RANK']))\n"
    )
    command = ["deepspeed", "--hostfile", "../hosts", "rank.py"]
    done = cluster.run(command, cwd=folder, env={"KEPT": "here", "GIVEN": "other"})
    assert done.returncode == 7, done.stdout + done.stderr
    said = dict(re.findall(r"^(node\d): (\{.*\})$", done.stdout, re.MULTILINE))
    shared_facts = {"WORLD_SIZE": "2", "MASTER_ADDR": "10.77.0.1", "GIVEN": "with spaces, = and 'quotes'", "KEPT": None}
    for rank, host in enumerate(("node1", "node2")):
        expected = {"host": host, "RANK": str(rank), "LOCAL_RANK": "0"} | shared_facts
        assert json.loads(said[host]) == expected


def test_a_rank_that_fails_alone_ends_all_hosts(cluster, shared):
    (shared / "file").write_text("")
    command = readme_block("--hostfile hosts train.py")[-1].replace("--output run", "--output file")
    done = cluster.run(["bash", "-euc", command[command.index("deepspeed --hostfile") :]], cwd=shared, timeout=200)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "node1: error: --output file is a file" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_rank_killed_on_one_host_is_named_on_the_other(cluster, shared):
    output = shared / "run_killed"
    command = readme_block("--hostfile hosts train.py")
    start = command[-1].index("deepspeed --hostfile")
    command[-1] = command[-1][start:].replace("--output run", "--output run_killed")
    with cluster.start(command, cwd=shared) as running:
        running.wait_for(lambda: (output / "metrics.jsonl").exists() and len(losses(output)) >= 3, timeout=240)
        (rank,) = [p for p in cluster.processes("node2", "train.py") if "--local_rank=0" in p.cmdline()[:5]]
        rank.kill()
        done = running.finish(200)
    assert done.returncode != 2, done.stdout + done.stderr
    assert re.search(r"^node1: error: a collective failed: node2 \(rank 1\) has not arrived", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr
