"""Schedules at their landmarks, for any lengths and in both units."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training.schedule import ScheduleConfig, landmarks, lr_factor

DECAYING = ("cosine", "linear", "wsd")


@st.composite
def schedules(draw, kinds=(*DECAYING, "constant")):
    """A valid schedule and the number of steps of its run."""
    total = draw(st.integers(2, 5000))
    kind = draw(st.sampled_from(kinds))
    warmup = draw(st.integers(0, total - 1))
    fields = {"schedule": kind, "warmup_steps": warmup}
    if kind == "wsd":
        fields["decay_steps"] = draw(st.integers(1, total - warmup))
        fields["decay_shape"] = draw(st.sampled_from(["linear", "sqrt", "cosine"]))
    if kind != "constant":
        fields["min_lr_ratio"] = draw(st.floats(0, 1))
    return ScheduleConfig(**fields), total


def curve(config: ScheduleConfig, total: int, **options) -> list[float]:
    return [lr_factor(config, step, total, **options) for step in range(1, total + 1)]


@given(schedules())
def test_warmup_starts_above_zero_and_ends_at_the_peak(case):
    config, total = case
    factors, warmup = curve(config, total), config.warmup_steps
    for step in range(1, warmup + 1):
        assert factors[step - 1] == step / warmup
    assert max(factors) <= 1
    assert min(factors) >= 0


@given(schedules(DECAYING))
def test_the_last_step_has_the_final_ratio_and_keeps_it(case):
    config, total = case
    assert lr_factor(config, total, total) == config.min_lr_ratio
    assert lr_factor(config, total + 7, total) == config.min_lr_ratio


@given(schedules())
def test_rises_during_warmup_and_never_after(case):
    config, total = case
    factors, warmup = curve(config, total), config.warmup_steps
    rising, falling = factors[:warmup], factors[max(0, warmup - 1) :]
    assert all(a < b for a, b in itertools.pairwise(rising))
    assert all(a >= b for a, b in itertools.pairwise(falling))


@given(schedules())
def test_no_jump_is_larger_than_the_steepest_part_of_the_shape(case):
    config, total = case
    factors = curve(config, total)
    marks = landmarks(config, total, step_tokens=1)
    decay = marks.decay_end - marks.decay_start if math.isfinite(marks.decay_end) else math.inf
    steepest = {"linear": 1 / decay, "cosine": math.pi / 2 / decay, "sqrt": 1 / math.sqrt(decay)}
    shape = config.decay_shape if config.schedule == "wsd" else config.schedule
    bound = max(steepest.get(shape, 0), 1 / config.warmup_steps if config.warmup_steps else 0)
    assert all(abs(a - b) <= bound + 1e-12 for a, b in itertools.pairwise(factors))


@given(schedules(), st.integers(1, 10**7))
def test_steps_and_tokens_describe_the_same_curve(case, step_tokens):
    config, total = case
    fields = config.model_dump(exclude_unset=True)
    for name in ("warmup", "decay"):
        if f"{name}_steps" in fields:
            fields[f"{name}_tokens"] = fields.pop(f"{name}_steps") * step_tokens
    by_tokens = ScheduleConfig(**fields)
    assert curve(by_tokens, total, step_tokens=step_tokens) == curve(config, total, step_tokens=step_tokens)


def test_lengths_in_tokens_need_not_be_whole_steps():
    config = ScheduleConfig(schedule="constant", warmup_tokens=250)
    assert curve(config, 5, step_tokens=100) == [0.4, 0.8, 1.0, 1.0, 1.0]


@given(st.integers(1, 300), st.floats(0, 0.9))
def test_cosine_is_that_of_torch(total, ratio):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total, eta_min=ratio)
    config = ScheduleConfig(schedule="cosine", min_lr_ratio=ratio)
    for factor in curve(config, total):
        optimizer.step()
        reference.step()
        assert factor == pytest.approx(reference.get_last_lr()[0], abs=1e-9)


def test_wsd_shapes_at_a_quarter_of_the_decay():
    expected = {"linear": 0.75, "sqrt": 0.5, "cosine": (1 + math.sqrt(0.5)) / 2}
    for shape, factor in expected.items():
        config = ScheduleConfig(schedule="wsd", warmup_steps=10, decay_steps=40, decay_shape=shape, min_lr_ratio=0)
        assert lr_factor(config, 60, 100) == 1.0
        assert lr_factor(config, 70, 100) == pytest.approx(factor)


def test_wsd_decays_over_the_last_tenth_by_default():
    factors = curve(ScheduleConfig(schedule="wsd"), 1000)
    assert factors[899] == 1.0
    assert factors[900] < 1.0


@pytest.mark.parametrize(
    ("fields", "total", "message"),
    [
        ({"schedule": "cosine", "warmup_steps": 10}, 10, "warmup .10 steps. leaves nothing of 10 steps"),
        ({"schedule": "linear", "warmup_tokens": 1100}, 10, "warmup .11 steps. leaves nothing"),
        ({"schedule": "wsd", "warmup_steps": 6, "decay_steps": 5}, 10, "warmup .6 steps. and decay .5 steps. do not"),
    ],
)
def test_a_schedule_longer_than_the_run_is_refused(fields, total, message):
    with pytest.raises(ValueError, match=message):
        landmarks(ScheduleConfig(**fields), total, step_tokens=100)


@pytest.mark.parametrize(
    "fields",
    [
        {"warmup_steps": 1, "warmup_tokens": 1},
        {"schedule": "wsd", "decay_steps": 1, "decay_tokens": 1},
        {"min_lr_ratio": 1.1},
        {"min_lr_ratio": float("nan")},
        {"warmup_steps": -1},
        {"decay_steps": 0},
        {"schedule": "cosin"},
        {"warm_up": 3},
    ],
)
def test_impossible_settings_are_refused(fields):
    with pytest.raises(ValueError):
        ScheduleConfig(**fields)


def test_settings_without_effect_are_named():
    config = ScheduleConfig(schedule="constant", decay_steps=3, decay_shape="sqrt", min_lr_ratio=0.1)
    assert config.without_effect() == ["decay_shape", "decay_steps", "min_lr_ratio"]
    assert ScheduleConfig(schedule="wsd", decay_steps=3, min_lr_ratio=0.1).without_effect() == []
    assert ScheduleConfig(schedule="cosine", decay_tokens=None).without_effect() == []
