"""train.py on a card, in the JSONs that one rank can have: near the CPU's run, continued, its figures those of a GPU."""

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from engine.checkpoint.manifest import steps
from tests.engine.programs import prepare
from tests.processes import free_port, run_cli
from training.records import read_records

pytestmark = pytest.mark.xdist_group("train")  # one worker makes the runs for all
ON_CARD = {"DS_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": "0"}
SHARES = {"zero0_fp32": 1e-3, "zero3_fp32": 1e-3} | dict.fromkeys(
    ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "zero2_fp16"), 2e-2
)
"""How far losses may be from float32 on the CPU."""


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    return folder, *prepare(folder)


@pytest.fixture(scope="module")
def trained(setting):
    """The runs of all JSONs, four at a time."""
    names = {"cpu": "zero0_fp32"} | {name: name for name in SHARES}
    with ThreadPoolExecutor(4) as pool:
        return dict(zip(names, pool.map(lambda name: train(setting, name, names[name]), names), strict=True))


def train(setting, name: str, ds_config: str, *flags: str):
    folder, recipe, data = setting
    words = ["--recipe", recipe, "--deepspeed_config", f"ds_configs/{ds_config}.json", "--data", data]
    launcher = ["deepspeed", "--num_gpus", "1", "--master_port", str(free_port())]
    start, environment = ([sys.executable], {}) if name.startswith("cpu") else (launcher, ON_CARD)
    done = run_cli([*start, "train.py", *words, "--output", str(folder / name), *flags], env=environment, timeout=400)
    return done, folder / name


def losses(run) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_records(run / "metrics.jsonl") if "loss" in r}


@pytest.mark.parametrize("ds_config", SHARES)
def test_a_run_is_near_that_of_the_cpu(trained, ds_config):
    done, run = trained[ds_config]
    assert done.returncode == 0, done.stdout + done.stderr
    expected, found = losses(trained["cpu"][1]), losses(run)
    assert found.keys() == expected.keys()
    assert all(abs(found[step] - loss) < SHARES[ds_config] * loss for step, loss in expected.items())
    assert torch.cuda.get_device_name() in (run / "run.json").read_text()
    of_steps = [r for r in read_records(run / "metrics.jsonl") if "loss" in r]
    assert all(r["memory_bytes"] > 0 and 0 < r["mfu"] < 1 for r in of_steps)


@pytest.mark.parametrize("ds_config", ["zero0", "zero2", "zero3"])
def test_a_continued_run_is_the_same(setting, trained, ds_config):
    _, run = trained[ds_config]
    again = run.with_name(f"{ds_config}-again")
    shutil.copytree(run, again)
    shutil.rmtree(steps(again)[0])
    done, _ = train(setting, again.name, ds_config)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [r for r in read_records(again / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in records][-4:] == [5, 6, 7, 8]
    expected = losses(run)
    print({r["step"]: r["loss"] - expected[r["step"]] for r in records[-4:]})
    assert all(r["loss"] == expected[r["step"]] for r in records[-4:])


def test_a_cpu_continues_what_a_card_began(setting, trained):
    _, run = trained["zero0_fp32"]
    again = run.with_name("cpu-continues")
    shutil.copytree(run, again)
    shutil.rmtree(steps(again)[0])
    done, _ = train(setting, again.name, "zero0_fp32")
    assert done.returncode == 0, done.stdout + done.stderr
    expected = losses(trained["cpu"][1])
    assert all(abs(losses(again)[step] - expected[step]) < 1e-3 * expected[step] for step in (5, 6, 7, 8))
