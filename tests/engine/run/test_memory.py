"""The memory that a run needs, before anything is built: arithmetic that adds up, never asks too much, and refuses in words."""

import contextlib
import ctypes
import gc
import io
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import engine.build
from engine.layout.mesh import Mesh
from engine.layout.pipeline import pipeline_bounds
from engine.run import memory
from engine.run.plan import RunPlan, make_plan
from launch.topology import Topology
from model.config import ModelConfig
from tests.engine.programs import BF16, Run, prepare, zero
from tests.forks import run_python
from tests.processes import ROOT
from tests.properties import examples
from tests.ranks import run_ranks
from tests.training.corpus import build
from training.environment import free_of_cgroups

CPU = torch.device("cpu")
MODEL = {"vocab_size": "8192", "hidden_size": "512", "intermediate_size": "1024", "num_hidden_layers": "2"}
LARGE = {f"model.{key}": value for key, value in MODEL.items()} | {
    "training.global_batch_tokens": "128",
    "training.micro_batch_samples": "1",
    "validation.every_steps": "null",
    "checkpoint.background": "false",
}
MEASURED = ["zero0_fp32", "zero2_offload", "zero3", "pipeline", "tensor2_zero2"]


@st.composite
def models(draw) -> ModelConfig:
    heads = draw(st.sampled_from([2, 4, 8]))
    return ModelConfig(
        vocab_size=draw(st.integers(50, 300)),
        hidden_size=heads * draw(st.sampled_from([2, 6, 8])),
        intermediate_size=8 * draw(st.integers(1, 9)),
        num_hidden_layers=draw(st.integers(1, 5)),
        num_attention_heads=heads,
        num_key_value_heads=2,
        tie_word_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        position_embedding=draw(st.sampled_from(["rope", "learned", "sinusoidal"])),
        max_position_embeddings=32,
        adapters=draw(
            st.sampled_from(
                [{}, {"names": ["a", "b"], "r": 1}, {"names": ["a"], "r": 1, "last_layers": 1, "train_base": True}]
            )
        ),
    )


def numel(sizes: list[memory.Size]) -> int:
    return sum(size.numel for size in sizes)


@examples(60)
@given(models(), st.integers(1, 5), st.sampled_from(["uniform", "parameters"]))
def test_the_stages_of_a_pipeline_hold_every_parameter(model, stages, partition):
    stages = min(stages, model.num_hidden_layers)
    bounds = pipeline_bounds(model, stages, partition, 16)
    held = [numel(memory.parameter_sizes(model, bounds, Mesh(rank, stages, stages))) for rank in range(stages)]
    second_copy = model.vocab_size * model.hidden_size if model.tie_word_embeddings and stages > 1 else 0
    assert sum(held) == model.num_parameters() + second_copy
    whole = memory.parameter_sizes(model, [], Mesh(0, 1))
    assert numel(whole) == model.num_parameters()
    assert numel([size for size in whole if size.trained]) == model.num_trained_parameters()


@examples(30)
@given(models())
def test_tensor_parallel_ranks_hold_every_parameter_and_share_the_large_ones(model):
    parts = [memory.parameter_sizes(model, [], Mesh(rank, 2, tensor=2)) for rank in range(2)]
    whole = memory.parameter_sizes(model, [], Mesh(0, 1))
    for first, second, size in zip(*parts, whole, strict=True):
        assert first.numel + second.numel == size.numel or first == second == size
    assert max(map(numel, parts)) < numel(whole)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("memory")
    return folder, *prepare(folder)


def plan(setting, ds_config: dict, ranks: int, overrides: dict | None = None) -> RunPlan:
    folder, recipe, data = setting
    (folder / "ds.json").write_text(json.dumps(ds_config))
    return make_plan(recipe, overrides or LARGE, str(folder / "ds.json"), data, Topology(0, 0, ranks, CPU))


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("more", [{}, BF16], ids=["fp32", "bf16"])
def test_the_parts_of_all_ranks_are_the_whole(setting, stage, more):
    planned = plan(setting, zero(stage, **more), 2)
    parameters = planned.recipe.model.num_parameters()
    needs = [memory.rank_need(planned, rank) for rank in range(2)]
    assert sum(need.optimizer for need in needs) == 12 * parameters
    copies = 1 if stage == 3 else 2
    assert sum(need.weights for need in needs) == copies * (2 if more else 4) * parameters


def test_higher_stages_more_ranks_offload_and_less_precision_need_less(setting):
    def need(config: dict, ranks: int = 2, **more: str) -> memory.Need:
        return memory.rank_need(plan(setting, config, ranks, LARGE | more), 0)

    for more in ({}, BF16):
        stages = [need(zero(stage, **more)).training for stage in (1, 2, 3)]
        assert stages == sorted(stages, reverse=True)
        for stage in (1, 2, 3):
            assert need(zero(stage, **more)).training < need(zero(stage, **more), 1).training
            offloaded = need(zero(stage, zero={"offload_optimizer": {"device": "cpu"}}, **more))
            assert offloaded.of_device() < need(zero(stage, **more)).of_device()
            nvme = {"device": "nvme", "nvme_path": "/tmp"}
            stripped = plan(setting, zero(stage, **more), 2)
            stripped.ds_config["zero_optimization"]["offload_optimizer"] = nvme
            assert memory.rank_need(stripped, 0).training < offloaded.training
    assert need(zero(2, **BF16)).training < need(zero(2)).training
    assert need(zero(0), **{"optimizer.name": "lion"}).optimizer < need(zero(0)).optimizer


def growth(folder: str, recipe: str, data: str) -> dict[str, dict]:
    """Bytes by which this rank's resident memory grew at most from before an engine was built to after two steps."""
    engine.build.ANNOUNCED_SECONDS, libc, results = 0.0, ctypes.CDLL(None), {}
    for name in ["zero3", *MEASURED]:  # what libraries take once is taken by the first
        gc.collect()
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here: proc(5)
        before = _status("VmRSS")
        ds_config = json.loads((ROOT / f"ds_configs/{name}.json").read_text())
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            run = Run(recipe, data, ds_config, Path(folder) / name, LARGE)
        run.steps(2)  # gradients meet the moments of the step before
        results[name] = {
            "peak": _status("VmHWM") - before,
            "need": memory.rank_need(run.plan, run.topology.rank),
            "printed": printed.getvalue(),
        }
        run.close()
        del run
    return results


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


@pytest.fixture(scope="module")
def grown(setting):
    folder, recipe, data = setting
    # every tensor gets pages of its own, which go back when it is freed
    return run_ranks(growth, 2, str(folder), recipe, data, env={"MALLOC_MMAP_THRESHOLD_": "262144"}, timeout=200)


@pytest.mark.parametrize("name", MEASURED)
def test_a_rank_really_takes_what_it_is_said_to_need(grown, name):
    for rank in grown:
        needed = rank[name]["need"].of_host(CPU)
        assert needed <= rank[name]["peak"] <= 3 * needed


def test_building_is_announced_when_it_takes_long(grown):
    for name in MEASURED:
        assert [rank[name]["printed"].count("building the model ...\n") for rank in grown] == [1, 0]


LLAMA_7B = ["--recipe", "recipes/llama-7b.yaml", "--deepspeed_config", "ds_configs/zero3.json"]


def test_what_cannot_fit_is_refused_before_anything_is_built(tmp_path):
    build(tmp_path / "data", {"a": [5000] * 4}, 4096, vocab_size=32000)
    output, without = tmp_path / "run", ["--validation.every_steps", "null"]
    done = run_python(["train.py", *LLAMA_7B, *without, "--data", str(tmp_path / "data"), "--output", str(output)])
    assert done.returncode == 2
    (sentence,) = done.stderr.strip().splitlines()
    states = (18 + 12) * 6_738_415_616  # bf16 weights, float32 sums of gradients, copies and two moments; these again
    needed = (states + 32 * 4096 * 4096 * 2) / 2**30  # and what each of the 32 blocks is given for a row of 4096
    assert sentence.startswith(f"error: this rank needs at least {needed:.0f} GiB of host memory, 75 GiB of it for ")
    assert re.search(r": start \d+ hosts like this one with 1 rank each, or go on with --allow_overcommit$", sentence)
    assert not output.exists()


def check(monkeypatch, planned: RunPlan, topology: Topology, host: int, gpu: int = 0, **options) -> str:
    free = {"cpu": host, "cuda": gpu}
    monkeypatch.setattr(memory, "free_memory_bytes", lambda device: free[device.type])
    return memory.check_memory(planned, topology, **options)


def test_the_nearest_json_that_fits_is_named(setting, monkeypatch):
    config, overrides = (
        json.loads((ROOT / "ds_configs/zero1.json").read_text()),
        {"training.global_batch_tokens": "512"},
    )
    planned, topology = plan(setting, config, 2, LARGE | overrides), Topology(0, 0, 2, CPU, 2)
    most = sum(memory.rank_need(planned, rank).of_host(CPU) for rank in range(2))
    line = check(monkeypatch, planned, topology, most)
    assert "13.1M parameters" in line
    assert "going on" not in line
    with pytest.raises(
        ValueError, match=r"the 2 ranks of this host need at least .*: take ds_configs/zero2.json, or start"
    ):
        check(monkeypatch, planned, topology, most - 1)
    assert "going on although the 2 ranks" in check(monkeypatch, planned, topology, most - 1, overcommit=True)
    alone = Topology(0, 0, 2, CPU, 1)  # each on a host of its own
    with pytest.raises(
        ValueError, match=r"this rank needs .*, or start 4 hosts like this one with 1 rank each, or go on"
    ):
        check(monkeypatch, planned, alone, memory.rank_need(planned, 0).of_host(CPU) - 1)
    with pytest.raises(ValueError, match="no shipped DeepSpeed config fits, on any number of hosts"):
        check(monkeypatch, planned, topology, 1000)


def test_the_copy_of_a_save_in_the_background_must_fit_too(setting, monkeypatch):
    config = json.loads((ROOT / "ds_configs/zero1_fp32.json").read_text())
    at_once, behind = (plan(setting, config, 2, LARGE | {"checkpoint.background": how}) for how in ("false", "true"))
    without, need = memory.rank_need(at_once, 0).of_host(CPU), memory.rank_need(behind, 0)
    assert need.snapshot == need.optimizer
    assert need.of_host(CPU) == without + need.snapshot
    topology, words = Topology(0, 0, 2, CPU, 1), r"of it for what saves in the background copy, and .* are free: set "
    with pytest.raises(ValueError, match=f"{words}checkpoint.background to false, or take ds_configs/"):
        check(monkeypatch, behind, topology, need.of_host(CPU) - 1)
    with pytest.raises(ValueError, match=f"{words}checkpoint.background to false"):
        check(monkeypatch, behind, topology, without)
    check(monkeypatch, at_once, topology, without)
    with pytest.raises(ValueError, match=r"of host memory and .* are free: (?!set checkpoint)"):
        check(monkeypatch, at_once, topology, without - 1)
    first, second = (
        memory.rank_need(plan(setting, zero(0), 2, LARGE | {"checkpoint.background": "true"}), r) for r in (0, 1)
    )
    assert (first.snapshot, second.snapshot) == (first.optimizer + first.weights, 0)


def test_the_line_is_about_the_stage_with_most_to_hold(setting, monkeypatch):
    planned = plan(setting, json.loads((ROOT / "ds_configs/pipeline.json").read_text()), 2)
    first, last = (memory.rank_need(planned, rank) for rank in range(2))
    most = max(first.training, last.training)
    assert first.training != last.training
    for rank in range(2):
        line = check(monkeypatch, planned, Topology(rank, rank, 2, CPU, 2), 10 * most)
        assert f"needs at least {most / 2**30:.2f} GiB" in line


def test_a_gpu_and_its_host_are_both_asked(setting, monkeypatch):
    offloaded = plan(setting, json.loads((ROOT / "ds_configs/zero2_offload.json").read_text()), 2)
    topology, need = Topology(1, 1, 2, torch.device("cuda", 1), 2), memory.rank_need(offloaded, 1)
    host, gpu = 2 * max(need.building, need.offloaded), need.of_device()
    assert gpu == need.weights < need.training == need.offloaded + need.weights
    assert "of GPU memory are free here" in check(monkeypatch, offloaded, topology, host, gpu)
    for short, place in (((host - 1, gpu), "host memory"), ((host, gpu - 1), "GPU memory")):
        with pytest.raises(ValueError, match=f"of {place} and"):
            check(monkeypatch, offloaded, topology, *short)


def test_control_groups_of_both_versions_limit_the_host(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    for folder, limit, used, cache in (("a", 1000, 700, 200), ("a/b", "max", 300, 0)):
        (tmp_path / folder / "memory.max").write_text(f"{limit}\n")
        (tmp_path / folder / "memory.current").write_text(f"{used}\n")
        (tmp_path / folder / "memory.stat").write_text(f"anon 1\nfile {cache}\n")
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text("5000\n")
    (tmp_path / "memory/memory.usage_in_bytes").write_text("4500\n")
    (tmp_path / "memory/memory.stat").write_text("total_cache 100\n")
    (tmp_path / "cgroup").write_text("9:cpu:/x\n4:memory:/seen/from/outside\n0::/a/b\n")
    assert list(free_of_cgroups(tmp_path / "cgroup", tmp_path)) == [600, 500]
    assert list(free_of_cgroups(tmp_path / "absent", tmp_path)) == []
