"""The curves of a report: their points, their places on every axis, smoothing, and panels that do not overlap."""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tools.test_report import Page, numbers, write_evaluations, write_run
from tools.report import page
from tools.run_history import read_run
from tools.run_plots import POINTS_PER_CURVE, _visible_points, smoothed
from tools.shown import LAYER_FIGURES
from training.metrics import LAYERS_FILE, METRICS_FILE
from training.records import read_records

CURVE = st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan)), min_size=1, max_size=200)


def write_long_run(folder: Path) -> Path:
    """200 steps of a minute; after 150 of them the run waits for three days."""
    records, now = [{"step": 0, "event": "notice", "text": "begins", "time": 1000.0}], 1000.0
    for step in range(1, 201):
        if step == 151:
            now += 3 * 86400
            records.append({"step": 150, "event": "notice", "text": "goes on", "time": now})
            records.append({"step": 150, "event": "resume", "time": now})
        now += 60
        noise = 0.5 * (-1) ** step + 0.3 * (step % 7)
        numbers = dict.fromkeys(
            ("grad_norm", "tokens_per_second", "mfu", "data_wait_fraction", "memory_bytes"), 1 + noise
        )
        numbers |= {"loss": 5 + noise, "objective": 5 + noise, "learning_rate": 1e-3, "skipped_steps": 0}
        numbers |= {"step_seconds": 60.0, "eta_seconds": 60.0 * (200 - step), "tokens": step * 512}
        records.append({"step": step, **numbers, "time": now})
        if step % 50 == 0:
            records.append({"step": step, "validation": {"books": {"loss": 4.0, "targets": 1}}, "time": now})
    (folder / METRICS_FILE).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def write_layers(folder: Path, names: tuple[str, ...] = ("embed_tokens", "layers.0", "layers.1", "norm")) -> Path:
    """Of every 25th step of `write_long_run`; the gradient of one layer is not finite once."""
    records = []
    for step in (1, *range(25, 201, 25)):
        figures = {kind: {name: 1e-3 * (1 + len(name)) * step for name in names} for kind in LAYER_FIGURES}
        figures["max_attention_logit"] = {"layers.0": -0.5, "layers.1": float(step)}
        if step == 50:
            figures["grad_norm"]["layers.1"] = None
        records.append({"step": step, "layers": figures, "time": 1000.0 + 60 * step})
    (folder / LAYERS_FILE).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_layers_are_drawn_over_every_axis(tmp_path):
    drawn = Page(page(read_run(write_layers(write_long_run(tmp_path))))).figure()
    maps = [trace for trace in drawn.data if trace.type == "heatmap"]
    assert len(maps) == len(LAYER_FIGURES)
    gradients, logits = maps[0], maps[-1]
    assert gradients.y == ("embed", "0", "1", "norm")
    assert logits.y == ("0", "1")
    steps = numbers(gradients.x).astype(int).tolist()
    assert steps == [1, *range(25, 201, 25)]
    assert gradients.meta["x"]["tokens"] == [512 * step for step in steps]
    np.testing.assert_allclose(gradients.meta["x"]["hours"], [step / 60 for step in steps], atol=2e-6)
    assert gradients.customdata[2][2] is gradients.z[2][2] is None
    assert 10 ** gradients.z[0][1] == pytest.approx(gradients.customdata[0][1], rel=1e-3)
    assert logits.z == logits.customdata


def test_every_point_has_its_place_in_tokens_and_hours(tmp_path):
    """The same values over another axis; the days between two launches are no hours of training."""
    write_long_run(tmp_path)
    records, drawn = read_records(tmp_path / METRICS_FILE), Page(page(read_run(tmp_path))).figure()
    tokens = {record["step"]: record["tokens"] for record in records if "tokens" in record}
    hours = {step: step * 60 / 3600 for step in tokens}
    for trace in drawn.data:
        steps = numbers(trace.x).tolist()
        assert len(steps) == len(trace.meta["x"]["tokens"]) == len(trace.meta["x"]["hours"])
        assert trace.meta["x"]["tokens"] == [tokens.get(step, 0) for step in steps]
        np.testing.assert_allclose(trace.meta["x"]["hours"], [hours.get(step, 0) for step in steps], atol=2e-6)
    marks = drawn.layout.meta["marks"]
    assert marks["step"] == [shape.x0 for shape in drawn.layout.shapes] == [0, 150, 150]
    assert marks["tokens"] == [0, 150 * 512, 150 * 512]
    np.testing.assert_allclose(marks["hours"], [0, 2.5, 2.5], atol=1e-6)


def test_adapters_have_panels_of_their_own(tmp_path):
    """With a gap where a step had nothing for one; a run without adapters has none."""
    metrics = write_long_run(tmp_path) / METRICS_FILE
    before = len(Page(page(read_run(tmp_path))).figure().data)
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    for record in records:
        if "loss" in record:
            losses = {"plays": 4.0} | ({"manuals": 3.0} if record["step"] % 2 else {})
            record |= {"adapter_losses": losses, "adapter_shares": {"plays": 0.25, "manuals": 0.75}}
            record["adapter_shares_of_sources"] = {"old <b>": {"plays": 1.0, "manuals": 0.0}} | (
                {"new": {"plays": 0.125, "manuals": 0.875}} if record["step"] > 100 else {}
            )
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    drawn = Page(page(read_run(tmp_path))).figure()
    assert len(drawn.data) == before + 2 * 4
    found: dict[str, list[np.ndarray]] = {"plays": [], "manuals": []}
    for trace in drawn.data:
        if trace.name in found:
            assert trace.showlegend == (not found[trace.name])
            found[trace.name].append(numbers(trace.y))
    _, shares, of_old, of_new = found["manuals"]
    np.testing.assert_array_equal(found["manuals"][0], [3.0, np.nan] * 100)
    np.testing.assert_array_equal(found["plays"][0], 4.0)
    np.testing.assert_array_equal(shares, 0.75)
    np.testing.assert_array_equal(of_old, 0.0)
    np.testing.assert_array_equal(of_new, [np.nan] * 100 + [0.875] * 100)
    titles = [" ".join(title.text.split("<br>")) for title in drawn.layout.annotations]
    assert "Share of the targets of old &lt;b&gt; that each adapter made" in titles


def test_noisy_curves_have_smoothed_ones_and_stay_behind_them(tmp_path):
    drawn = Page(page(read_run(write_long_run(tmp_path)))).figure()
    losses = [trace for trace in drawn.data if trace.name.startswith("training")]
    assert [(trace.meta["role"], trace.visible, trace.opacity) for trace in losses] == [
        ("raw", None, 0.3), ("light", False, None), ("medium", True, None), ("strong", False, None),
    ]  # fmt: skip
    roughness = [np.abs(np.diff(numbers(trace.y), 2)).mean() for trace in losses]
    assert sorted(roughness, reverse=True) == roughness
    assert not [trace for trace in drawn.data if trace.name == "Learning rate, smoothed"]


def test_nothing_overlaps_in_a_narrow_page(tmp_path):
    """One panel below the other, over the whole width; titles in lines that 360 pixels hold, in gaps of their own."""
    write_evaluations(write_run(tmp_path))
    shown = Page(page(read_run(tmp_path)))
    for name in ("figure", "evaluations"):
        layout = shown.figure(name, "narrow").layout
        axes = [layout[key] for key in layout if key.startswith("yaxis")]
        assert {tuple(layout[key].domain) for key in layout if key.startswith("xaxis")} == {(0, 1)}
        area = layout.height - layout.margin.b
        edges = sorted((axis.domain for axis in axes), reverse=True)
        for above, below in pairwise(edges):
            assert (above[0] - below[1]) * area >= 30, "no room for the ticks"
        for title in layout.annotations:
            lines = title.text.split("<br>")
            assert max(map(len, lines)) <= 38
            (gap,) = [a[0] - b[1] for a, b in pairwise([(1, 2), *edges]) if b[1] == title.y]
            assert gap * area >= 17 * len(lines)


@given(CURVE, st.integers(1, 200))
def test_long_curves_keep_their_extremes_and_gaps(values, repeats):
    curve = np.tile(values, repeats)
    kept = _visible_points(curve)
    assert len(kept) <= POINTS_PER_CURVE + 2
    assert (np.diff(kept) > 0).all()
    assert {0, len(curve) - 1} <= set(kept.tolist())
    assert np.isnan(curve[kept]).any() == np.isnan(curve).any()
    if not np.isnan(curve).all():
        assert np.nanmin(curve[kept]) == np.nanmin(curve)
        assert np.nanmax(curve[kept]) == np.nanmax(curve)


@given(st.floats(-10, 10), st.floats(-1, 1), st.integers(1, 500))
def test_smoothing_neither_lags_nor_bends_a_straight_line(start, slope, length):
    line = start + slope * np.arange(length)
    np.testing.assert_allclose(smoothed(line, 0.03), line, atol=1e-9)


def test_smoothing_passes_over_gaps():
    curve = np.full(1000, 2.0)
    curve[[0, 300, 301]] = np.nan
    np.testing.assert_array_equal(smoothed(curve, 0.03)[1:], 2.0)
