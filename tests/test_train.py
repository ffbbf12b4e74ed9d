"""train.py as users start it: real launchers where they matter, real kills, real files."""

import fcntl
import json
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml

from engine.checkpoint.manifest import digest_of_file, read_manifest, seal, steps
from tests.engine.programs import prepare
from tests.forks import run_python, start_python
from tests.processes import free_port, run_cli, start_cli
from tests.training.corpus import build
from tests.training.test_wandb_run import read_run
from training.records import read_records

LAUNCHERS = {
    "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", "{port}"],
    "torchrun": ["torchrun", "--nproc_per_node", "2", "--master_port", "{port}"],
    "python": [sys.executable],
}


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    return folder, *prepare(folder)


def words(setting, output: Path, *flags: str, ds_config: str = "zero2_fp32") -> list[str]:
    _, recipe, data = setting
    arguments = ["--recipe", recipe, "--deepspeed_config", f"ds_configs/{ds_config}.json", "--data", data]
    return ["train.py", *arguments, "--output", str(output), *flags]


def command(setting, output: Path, *flags: str, launcher: str = "python") -> list[str]:
    return [*(word.format(port=free_port()) for word in LAUNCHERS[launcher]), *words(setting, output, *flags)]


def losses(output: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_records(output / "metrics.jsonl") if "loss" in r}


def events(output: Path) -> list[str]:
    return [record["event"] for record in read_records(output / "metrics.jsonl") if "event" in record]


@pytest.fixture(scope="module")
def finished(setting):
    """An uninterrupted run of 8 steps under the deepspeed launcher on two ranks."""
    output = setting[0] / "finished"
    flags = ["--logging.wandb", "true", "--logging.wandb_project", "plays"]
    done = run_cli(command(setting, output, *flags, launcher="deepspeed"), timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return output, done


def test_finished_run_leaves_all_its_files(finished):
    output, done = finished
    assert sorted(losses(output)) == list(range(1, 9))
    assert [path.name for path in steps(output)] == ["step-00000008", "step-00000004"]
    manifest = read_manifest(steps(output)[0])
    assert manifest.state.consumed_samples == 64
    assert manifest.layout.world_size == 2
    facts = json.loads((output / "run.json").read_text())
    assert facts["recipe"]["optimizer"]["lr"] == 3e-3
    assert facts["ds_config"]["train_batch_size"] == 8
    assert facts["memory"]["optimizer"] > facts["memory"]["weights"]
    one = dict.fromkeys(("pipeline", "tensor", "sequence"), 1)
    assert facts["layout"] == {"world_size": 2, **one, "split_rows": False, "exchange": "heads"}
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("memory: ")]
    assert line.endswith("are free here, for 2 ranks")
    validations = [r for r in read_records(output / "metrics.jsonl") if "validation" in r]
    assert [r["step"] for r in validations] == [4, 8]
    assert not [line for line in done.stderr.splitlines() if "terminate called" in line or "Traceback" in line]
    assert len([line for line in done.stdout.splitlines() if re.match(r"step 8/8 \| loss", line)]) == 1


def test_wandb_run_is_one_and_complete(setting, finished, tmp_path):
    """Of two ranks one records; a later launch continues the same run id; the config says what determined the run."""
    output = tmp_path / "longer"
    shutil.copytree(finished[0], output)
    flags = ["--logging.wandb", "true", "--logging.wandb_project", "plays", "--training.max_steps", "10"]
    done = run_python(words(setting, output, *flags), timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    files = sorted(output.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    first, second = (read_run(path) for path in files)
    assert first[0].run_id == second[0].run_id == read_manifest(steps(output)[0]).state.wandb_id
    config = first[1]
    assert config["recipe"]["optimizer"]["lr"] == 3e-3
    assert config["ds_config"]["train_batch_size"] == 8
    assert config["data"]["fingerprint"] == read_manifest(steps(output)[0]).state.data_fingerprint
    assert config["environment"]["packages"]["deepspeed"]
    assert sorted(first[2]) == list(range(1, 9))
    assert first[2][8]["train/loss"] == losses(output)[8]
    assert "validation/again/loss" in first[2][8]
    assert {9, 10} <= set(second[2])


@pytest.mark.parametrize("launcher", ["torchrun", "python"])
def test_every_launcher_trains_the_same(setting, finished, launcher):
    output = setting[0] / launcher
    done = run_cli(command(setting, output, launcher=launcher), timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(output) == pytest.approx(losses(finished[0]), rel=1e-5)


def test_killed_run_continues_on_other_ranks_and_falls_back_from_damage(setting, finished, tmp_path):
    output = tmp_path / "killed"
    slow = ["--checkpoint.every_steps", "2", "--training.max_steps", "8"]
    with start_python(words(setting, output, *slow), ranks=2) as running:
        running.wait_for(lambda: (output / "checkpoints/step-00000004").is_dir(), timeout=120)
        running.kill_all(signal.SIGKILL)
    newest = steps(output)[0]
    shard = max(newest.glob("*optim_states.pt"))
    damaged = bytearray(shard.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    shard.write_bytes(damaged)
    (output / "checkpoints" / ".step-00000099.partial").mkdir()
    done = run_python(words(setting, output, *slow), timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"damaged checkpoint passed over: {shard}" in done.stdout
    assert "written_by=ZeRO-2 on 2 ranks" in done.stdout
    assert losses(output) == pytest.approx(losses(finished[0]), rel=1e-5)
    assert sorted(losses(output)) == list(range(1, 9))
    assert not list((output / "checkpoints").glob(".*"))


def test_another_run_goes_on_from_its_weights_with_longer_rows(setting, finished, tmp_path):
    build(tmp_path / "longer", {"long": [200, 700, 300, 90, 400, 500, 256, 128, 600]}, 256, vocab_size=256)
    shutil.copytree(Path(setting[2]) / "tokenizer", tmp_path / "longer/tokenizer")
    shutil.copytree(finished[0], tmp_path / "source")
    yarn = "{rope_type: yarn, factor: 4, original_max_position_embeddings: 64}"
    flags = ["--data", str(tmp_path / "longer"), "--training.max_steps", "2", "--schedule.schedule", "constant"]
    flags += ["--training.initial_weights", str(tmp_path / "source"), "--model.rope_scaling", yarn]
    flags += ["--model.max_position_embeddings", "256", "--validation.sets", "{}", "--validation.every_steps", "null"]
    flags += ["--training.micro_batch_samples", "2"]
    first = run_python(words(setting, tmp_path / "run", *flags, "--training.max_hours", "0.0000001"), timeout=120)
    assert first.returncode == 75, first.stdout + first.stderr
    shutil.rmtree(tmp_path / "source")  # no longer needed
    done = run_python(words(setting, tmp_path / "run", *flags), timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(losses(tmp_path / "run")) == [1, 2]
    assert losses(tmp_path / "run")[1] < losses(finished[0])[1] - 0.05, losses(finished[0])


def test_sigterm_saves_and_exits_with_its_own_code(setting, finished, tmp_path):
    output = tmp_path / "stopped"
    long = ["--training.max_steps", "100000", "--validation.every_steps", "null", "--schedule.decay_steps", "null"]
    with start_cli(command(setting, output, *long, launcher="torchrun")) as running:
        running.wait_for(lambda: (output / "metrics.jsonl").exists() and len(losses(output)) >= 3, timeout=120)
        running.send_signal(signal.SIGTERM)
        running.finish(60)
    stop = [r for r in read_records(output / "metrics.jsonl") if r.get("event") == "stop"]
    assert [record["reason"] for record in stop] == ["SIGTERM"]
    assert steps(output)[0].name == f"step-{stop[0]['step']:08d}"
    with start_python(words(setting, output, *long)) as running:
        running.wait_for(lambda: events(output).count("resume") == 1, timeout=120)
        running.send_signal(signal.SIGUSR1)
        assert running.finish(60).returncode == 75


def test_time_limit_stops_with_a_checkpoint(setting, tmp_path):
    done = run_python(words(setting, tmp_path / "run", "--training.max_hours", "0.0000001"), timeout=120)
    assert done.returncode == 75
    assert [path.name for path in steps(tmp_path / "run")] == ["step-00000001"]


def test_all_checkpoints_damaged_is_an_error_not_a_fresh_start(setting, finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "copy")
    for folder in steps(tmp_path / "copy"):
        (folder / "manifest.json").write_text("{")
    done = run_python(words(setting, tmp_path / "copy", "--training.max_steps", "9"), timeout=120)
    assert done.returncode == 2
    assert "every checkpoint is damaged" in done.stderr
    assert "Traceback" not in done.stderr


class Payload:
    """Unpickled, it would write the file `ran`."""

    def __init__(self, file: str):
        self.file = file

    def __reduce__(self):
        return open, (self.file, "w")


def plant(folder: Path, file: str) -> None:
    """Put a payload into every file of a checkpoint, with sizes and digests as if it had been written so."""
    manifest = read_manifest(folder)
    for name in manifest.files:
        torch.save(torch.load(folder / name, weights_only=False) | {"payload": Payload(file)}, folder / name)
        manifest.files[name] = ((folder / name).stat().st_size, digest_of_file(folder / name))
    (folder / "manifest.json").write_bytes(seal(manifest))


@pytest.mark.parametrize("ds_config", ["zero0_fp32", "zero2_fp32", "zero3_fp32"])
def test_code_in_a_checkpoint_runs_nowhere(setting, tmp_path, ds_config):
    run, ran = tmp_path / "run", tmp_path / "ran"
    stopped = run_python(words(setting, run, "--training.max_hours", "1e-7", ds_config=ds_config), timeout=120)
    assert stopped.returncode == 75, stopped.stderr
    plant(steps(run)[0], str(ran))
    other = {"zero0_fp32": "zero2_fp32"}.get(ds_config, "zero0_fp32")
    for program in (
        words(setting, run, ds_config=ds_config),
        words(setting, run, ds_config=other),
        words(setting, tmp_path / "new", "--training.initial_weights", str(run)),
        ["-m", "tools.export", str(run), "--output", str(tmp_path / "hf")],
    ):
        done = run_python(program, timeout=120)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "is not opened: it is damaged or holds more than weights" in done.stderr
        assert "Traceback" not in done.stderr
    assert not ran.exists()


def test_going_back_to_an_earlier_step(setting, finished, tmp_path):
    run = tmp_path / "copy"
    shutil.copytree(finished[0], run, ignore=shutil.ignore_patterns("wandb"))
    missing = run_python(words(setting, run, "--resume_step", "5"), timeout=120)
    assert missing.returncode == 2
    assert "has no checkpoint of step 5; there are: 4, 8" in missing.stderr
    back = run_python(words(setting, run, "--resume_step", "4"), ranks=2, timeout=200)
    assert back.returncode == 0, back.stdout + back.stderr
    assert losses(run) == losses(finished[0])
    assert [folder.name for folder in (run / "set_aside").iterdir()] == ["step-00000008"]
    assert [read_manifest(folder).state.step for folder in steps(run)] == [8, 4]


def test_full_disk_ends_in_a_sentence_and_keeps_what_was_there(setting, tmp_path):
    output = tmp_path / "run"
    first = run_python(words(setting, output, "--training.max_hours", "0.0000001"), timeout=120)
    assert first.returncode == 75
    limited = ["bash", "-c", 'ulimit -f 40; exec "$@"', "bash", *command(setting, output)]
    done = run_cli(limited, timeout=120)
    assert done.returncode == 2, done.stderr
    assert "could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in steps(output)] == ["step-00000001"]
    assert run_python(words(setting, output), timeout=120).returncode == 0


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (
            ["--model.hidden_size", "48", "--training.seed", "4"],
            ["model.hidden_size was 32 and is now 48", "training.seed"],
        ),
        (["--data.weights", "{long: 1, short: 1}"], ["data.weights"]),
    ],
)
def test_another_run_is_not_continued(setting, finished, flags, parts):
    done = run_python(words(setting, finished[0], *flags), timeout=60)
    assert done.returncode == 2
    assert all(part in done.stderr for part in ["cannot be continued", *parts])


def test_bad_input_is_reported_at_once_before_any_process_group(setting, tmp_path):
    recipe = setting[1]
    tree = yaml.safe_load(Path(recipe).read_text())
    tree["optimizer"] = {"learning_rate": 1e-3, "betas": [0.9]}
    tree["trainning"] = {}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "ds.json").write_text('{"zero_optimisation": {"stage": 2}}')
    paths = {"recipe": "recipe.yaml", "deepspeed_config": "ds.json", "data": ".", "output": "run"}
    flags = [word for name, path in paths.items() for word in (f"--{name}", str(tmp_path / path))]
    done = run_python(["train.py", *flags], timeout=60)
    assert done.returncode == 2
    for part in (
        "unknown key; did you mean 'training'?",
        "optimizer.learning_rate: unknown key",
        "optimizer.betas",
        "did you mean 'zero_optimization'?",
        "is not a prepared data set",
    ):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_second_run_on_the_same_folder_is_refused(setting, tmp_path):
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = run_python(words(setting, tmp_path / "run"), timeout=60)
    assert done.returncode == 2
    assert "another training process is writing" in done.stderr


def test_half_set_launcher_environment_is_refused(setting, tmp_path):
    done = run_python(words(setting, tmp_path / "run"), env={"RANK": "0"}, timeout=60)
    assert done.returncode == 2
    assert "start train.py with `deepspeed` or" in done.stderr


def test_help_names_every_recipe_key(setting):
    done = run_python(["train.py", "--help-all"], env={"COLUMNS": "200"}, timeout=60)
    assert done.returncode == 0
    assert "default: None)" not in done.stdout.partition("recipe keys")[0]
    for part in ("--optimizer.lr", "--training.max_hours", "--data.weights", "--model.rope_scaling", "default: 0.1"):
        assert part in done.stdout


def test_exit_code_of_a_failing_rank_reaches_the_launcher(setting, tmp_path):
    (tmp_path / "file").write_text("")
    done = run_cli(command(setting, tmp_path / "file", launcher="deepspeed"), timeout=100)
    assert done.returncode != 0
    assert "is a file" in done.stderr + done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
