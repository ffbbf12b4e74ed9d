"""How layouts are written on a command line, and what counts as the same computation."""

import math
from pathlib import Path

import pytest
import torch

from bench.equivalence import REFERENCE, default_layouts
from tests.engine.programs import prepare
from tools.layouts import final_weights
from tools.layouts.comparison import DEFAULT_OVERRIDES, DEFAULT_RECIPE, Difference, Tolerance, compare
from tools.layouts.final_weights import Weights
from tools.layouts.layout import LaunchFailed, Layout, Setting, StepRecord, parse_layout, plan_layout, rounds_more

FILE = "ds_configs/zero2_fp32.json"
STEP = StepRecord(1, 2.0, 0.5, True, "rows", 1.0, 10**9, 0.0)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    recipe, data = prepare(tmp_path_factory.mktemp("layouts"))
    return Setting(recipe, {}, data)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{FILE}:2", Layout("zero2_fp32 x2", FILE, 2, None, {}, {})),
        (f"all of it={FILE}:4:2", Layout("all of it", FILE, 4, 2, {}, {})),
        (f"{FILE}:4:2", Layout("zero2_fp32 x4 in 2 stages", FILE, 4, 2, {}, {})),
        (
            f"mine={FILE}:1 a.b=cpu c=2 --training.seed 4 --optimizer.betas='[0.9, 0.9]' d=true",
            Layout(
                "mine",
                FILE,
                1,
                None,
                {"a.b": "cpu", "c": 2, "d": True},
                {"training.seed": "4", "optimizer.betas": "[0.9, 0.9]"},
            ),
        ),
        (f"{FILE}:2 c=2", Layout("zero2_fp32 x2 c=2", FILE, 2, None, {"c": 2}, {})),
    ],
)
def test_a_layout_is_read(text, expected):
    assert parse_layout(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", FILE, f"{FILE}:0", f"{FILE}:two", f"{FILE}:2 words", f"{FILE}:2 --training.seed", f"{FILE}:2:", "a=b=c:2"],
)
def test_anything_else_is_refused_with_the_flag(text):
    with pytest.raises(ValueError, match=r"^--to "):
        parse_layout(text, "--to")


def test_changed_keys_reach_the_plan(prepared, tmp_path):
    changes = "zero_optimization.offload_optimizer.device=cpu train_micro_batch_size_per_gpu=1"
    layout = parse_layout(f"{FILE}:2 {changes} --training.seed 9")
    plan = plan_layout(layout, prepared, tmp_path)
    assert plan.ds_config["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    assert (plan.batch.micro_batch_samples, plan.recipe.training.seed, plan.mesh.world_size) == (1, 9, 2)
    assert not rounds_more(plan)


def test_reasons_name_the_file_that_the_user_named(prepared, tmp_path):
    with pytest.raises(ValueError, match=f"^{FILE}: unknown key 'zero_optimisation'"):
        plan_layout(parse_layout(f"{FILE}:2 zero_optimisation.stage=3"), prepared, tmp_path)
    with pytest.raises(ValueError, match=f"^{FILE}: train_batch_size.x cannot be set"):
        plan_layout(parse_layout(f"{FILE}:2 train_batch_size.x=3"), prepared, tmp_path)


@pytest.mark.parametrize(
    "words",
    ["zero2.json:1", "zero0.json:1", "zero0_onebit.json:2", f"{Path(FILE).name}:1 communication_data_type=bf16"],
)
def test_what_rounds_more_than_float32(words, prepared, tmp_path):
    assert rounds_more(plan_layout(parse_layout(f"ds_configs/{words}"), prepared, tmp_path))


def test_every_default_layout_can_hold_the_default_recipe(prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    setting = Setting(DEFAULT_RECIPE, DEFAULT_OVERRIDES, prepared.data)
    layouts = [parse_layout(text) for text in (REFERENCE, *default_layouts())]
    assert not any(rounds_more(plan_layout(layout, setting, tmp_path)) for layout in layouts)
    assert {layout.file for layout in layouts} == {str(path) for path in Path("ds_configs").glob("*_fp32.json")}


@pytest.mark.parametrize(
    ("change", "within"),
    [
        ({}, True),
        ({"loss": 2.0 + 1e-5}, True),
        ({"loss": 2.0 + 3e-5}, False),
        ({"loss": math.nan}, False),
        ({"grad_norm": 0.5 + 3e-5}, True),
        ({"grad_norm": 0.5 + 6e-5}, False),
        ({"grad_norm": math.inf}, False),
        ({"samples": "others"}, False),
    ],
)
def test_steps_are_the_same_within_the_tolerance(change, within):
    difference = compare([STEP, STEP._replace(**change)], [STEP, STEP])
    assert Tolerance(1e-5, 1e-4).allows(difference) == within


def test_half_precision_is_judged_by_the_loss_alone():
    half = Tolerance(0.05, None)
    assert half.allows(Difference(0.04, 9.0, True, 0.3))
    assert not half.allows(Difference(0.06, 0.0, True, 0.0))
    assert not half.allows(Difference(0.0, 0.0, False, 0.0))


def test_other_steps_are_no_comparison():
    with pytest.raises(LaunchFailed, match=r"took the steps \[1\] instead of 2 to 2"):
        compare([STEP], [STEP._replace(step=2)])


def test_weights_are_compared_parameter_by_parameter(tmp_path, monkeypatch):
    kept = {"large": torch.full((10, 10), 3.0), "zero": torch.zeros(4), "norm": torch.ones(4)}
    runs = {
        "kept": kept,
        "near": kept | {"norm": torch.tensor([1.0, 1.0, 1.0, 1.002])},
        "broken": {"large": torch.full((10, 10), math.nan)} | kept | {"large": torch.full((10, 10), math.nan)},
        "wider": kept | {"norm": torch.ones(5)},
        "fewer": {"large": kept["large"]},
    }
    monkeypatch.setattr(final_weights, "find", lambda run: (run, None))
    monkeypatch.setattr(final_weights, "read_weights", lambda run, _: iter(runs[run].items()))
    weights = Weights("kept", tmp_path / "weights")
    assert weights.difference("kept") == 0.0
    assert weights.difference("near") == pytest.approx(0.001, rel=1e-3)
    assert math.isnan(weights.difference("broken"))
    for other in ("wider", "fewer"):
        with pytest.raises(LaunchFailed, match="has another model"):
            weights.difference(other)
