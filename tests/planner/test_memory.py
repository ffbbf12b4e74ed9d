"""What ranks are said to hold: on fake tensors what torch's own tracker counts, and in every layout what its parts add up to."""

import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from engine.layout.mesh import Mesh
from model.documents import Documents
from model.llama import Llama
from planner import activations
from planner.activations import Numbers, RowsHere, Trials
from planner.hardware import find_hardware
from planner.live_bytes import LiveBytes
from planner.memory import largest, rank_memory, states_of
from planner.prepare import plan_without_data
from planner.search import room_of, search
from planner.shapes import fake_tensors
from tests.processes import ROOT
from training.config import Recipe

RECIPE = {
    "model": {
        "vocab_size": 4096,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 4096,
    },
    "training": {"global_batch_tokens": 65536, "max_steps": 10},
    "optimizer": {"lr": 1e-3},
    "validation": {"every_steps": None},
}
FLOAT32 = Numbers(torch.float32, None, "cpu")


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    file.write_text(yaml.safe_dump(RECIPE))
    return str(file)


def plan_of(recipe_file, folder, config, hardware="h100x8", length=2048):
    files = [ROOT / f"ds_configs/{config}.json"]
    return plan_without_data(recipe_file, folder, [length], None, files, find_hardware(hardware), {})


def test_bytes_are_those_of_torchs_tracker():
    config = Recipe.model_validate(RECIPE).model
    with FakeTensorMode():
        model, tracker, live = Llama(config), MemTracker(), LiveBytes()
        ids = torch.empty(2, 512, dtype=torch.int64)
        documents = Documents(ids, [512, 512], torch.empty(3, dtype=torch.int32))
        tracker.track_external(model)
        live.leave_out(*model.parameters(), ids)
        peaks = []
        for mode in (tracker, live):
            with mode:
                model.hidden_states(ids, documents).sum().backward()
            model.zero_grad()
            documents.rotary = None
            peaks.append(live.peak)
        (found,) = (each["Total"] for each in tracker.get_tracker_snapshot("peak").values())
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert live.peak == pytest.approx(found - weights, rel=0.01)


@pytest.mark.parametrize("mesh", [Mesh(0, 1), Mesh(0, 2, tensor=2), Mesh(0, 2, sequence=2)], ids=str)
def test_what_layers_hold_grows_with_the_rows(mesh):
    recipe, trials = Recipe.model_validate(RECIPE), Trials()
    one, three = (trials.layers(recipe, mesh, RowsHere(rows, 2048, 1), FLOAT32) for rows in (1, 3))
    block_of_one, block_of_three = one.kinds[1], three.kinds[1]
    assert block_of_three.plain.kept == pytest.approx(3 * block_of_one.plain.kept, rel=0.01)
    assert block_of_one.again.kept * 4 < block_of_one.plain.kept
    assert len(one.kinds) == recipe.model.num_hidden_layers + 2


@pytest.mark.parametrize(
    "mesh",
    [
        Mesh(0, 1),
        Mesh(0, 2, tensor=2, split_rows=True),
        Mesh(0, 4, sequence=4),
        Mesh(0, 2, sequence=2, exchange="keys"),
    ],
    ids=str,
)
def test_tensors_of_no_device_hold_what_fake_ones_do(mesh, monkeypatch):
    recipe = Recipe.model_validate(RECIPE | {"model": RECIPE["model"] | {"num_key_value_heads": 2, "qk_norm": True}})

    def found():
        numbers, trials = Numbers(torch.bfloat16, None, "cuda"), Trials()
        return [trials.layers(recipe, mesh, RowsHere(rows, 2048, 1), numbers) for rows in (1, 3)]

    of_no_device = found()
    monkeypatch.setattr(activations, "meta_tensors", fake_tensors)
    assert found() == of_no_device


def test_layers_are_run_once_for_all_jsons_that_hold_them_alike(recipe_file, tmp_path, monkeypatch):
    runs = []
    usual = activations._Trial.run
    monkeypatch.setattr(activations._Trial, "run", lambda trial: runs.append(trial.mesh) or usual(trial))
    plan, hardware = plan_of(recipe_file, tmp_path, "zero1"), find_hardware("h100x8")
    files = [ROOT / f"ds_configs/{name}.json" for name in ("zero1", "zero2", "zero3", "pipeline")]
    found = search(plan, files, hardware, {}, lambda plan: None)
    assert {each.file for each in found.prospects} == {*files}
    assert len(runs) == 2  # with one row and with two


def test_more_ranks_and_more_recomputation_need_less(recipe_file, tmp_path):
    trials = Trials()
    plans = {n: plan_of(recipe_file, tmp_path / str(n), "zero3", f"h100x{n}") for n in (2, 8)}
    states = [states_of(plan, plan.mesh, trials) for plan in plans.values()]
    assert states[1].optimizer * 4 == pytest.approx(states[0].optimizer, rel=0.01)
    peaks = [rank_memory(plans[8], 0, "cuda", blocks, trials).peak for blocks in range(5)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < peaks[0]


def test_the_fewest_blocks_are_recomputed_that_fit(recipe_file, tmp_path):
    hardware, trials = find_hardware("h100x8"), Trials()
    plan = plan_of(recipe_file, tmp_path, "zero1")
    peaks = [largest(plan, "cuda", blocks, trials).peak for blocks in range(5)]
    tight = (peaks[1] + peaks[2]) // 2  # 2 blocks fit, 1 does not
    share = room_of(hardware) / hardware.device.memory
    device = hardware.device.model_copy(update={"memory": int(tight / share)})
    small = hardware.model_copy(update={"device": device})
    files = [ROOT / f"ds_configs/{name}.json" for name in ("zero1", "zero0_onebit")]
    found = search(plan, files, small, {}, lambda plan: None)
    (one,) = [each for each in found.prospects if each.file == files[0]]
    assert (one.rows, one.recomputed) == (1, 2)
    assert one.memory.peak <= tight


@pytest.mark.parametrize("config", ["zero1_fp32", "zero2_fp32", "pipeline_fp32"])
def test_buckets_take_memory_on_cpus_as_gradients_fill_them(recipe_file, tmp_path, config):
    """Where a rank holds most, at the head, none has come: a GPU has given the buckets all of their memory by then."""
    plan, trials = plan_of(recipe_file, tmp_path, config, "h100x2"), Trials()
    zero = plan.ds_config["zero_optimization"]

    def peak(device, elements):
        other = plan._replace(ds_config=plan.ds_config | {"zero_optimization": zero | {"reduce_bucket_size": elements}})
        return rank_memory(other, 0, device, trials=trials).peak

    on_cpu, on_gpu = (peak(device, 500_000) - peak(device, 10_000) for device in ("cpu", "cuda"))
    assert on_cpu < on_gpu / 2
