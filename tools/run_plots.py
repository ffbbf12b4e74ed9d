"""The curves of a run in the report: loss, learning rate, speed, memory, and what happened when.

Every trace is drawn over the optimizer step and carries the same points' tokens and hours in its `meta`; noisy curves have
smoothed ones beside them. The page's selectors choose among these, nothing is computed there.
"""

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from tools.layer_plots import layer_panels
from tools.panels import COLORS, Drawing, Panel, draw
from tools.run_history import Run
from tools.shown import OF_GROUPS, OF_SOURCES, SERIES, Series

POINTS_PER_CURVE, POINTS_WHEN_SMOOTH = 3000, 600
FEW_POINTS = 30
SMOOTHING = {"light": 0.01, "medium": 0.03, "strong": 0.1}
"""Share of the curve over which a mean is taken."""
SMOOTHED_FROM, SMOOTHED_AT_FIRST = 100, "medium"
AXES = {
    "step": {"title": "optimizer step", "tickformat": ",d"},
    "tokens": {"title": "tokens", "tickformat": "~s"},
    "hours": {"title": "hours of training", "tickformat": "~g"},
}
EVENT_COLORS = {"resume": "#f59e0b", "restart": "#b91c1c", "skip": "#ef4444", "checkpoint": "#9ca3af"}
ADAPTER_PANELS = (
    ("Loss by adapter (nats per token)", "adapter_losses", "~g"),
    ("Share of the targets that each adapter made", "adapter_shares", "~%"),
)


def figure(run: Run) -> Drawing:
    """All curves in one figure whose panels zoom together."""
    panels = [panel_of(each, _of_series(each.title, run, each, showlegend=False)) for each in SERIES]
    marked = [event for event in run.events if event["event"] != "checkpoint"][-POINTS_PER_CURVE // 10 :]
    loss = Panel("Loss (nats per token)", _losses(run), {"tickformat": AXES["step"]["tickformat"]}, {}, height=360)
    strip = Panel("", _events(run), _x_axis(), {"type": "category", "showgrid": False, "dtick": 1}, height=70)
    panels += [*_of_sources(run), *_of_groups(run), *_of_adapters(run), *layer_panels(run, _x_axis)]
    return draw(
        [[loss], [strip], *in_pairs(panels)],
        shapes=[_line_across_the_loss(event) for event in marked],
        meta={"axes": AXES, "marks": {axis: [event[axis] for event in marked] for axis in AXES}},
    )


def comparison(runs: Sequence[Run]) -> Drawing:
    """The same curves of several runs, a colour for each."""
    losses: list[go.Scatter] = []
    of_series: dict[str, list[go.Scatter]] = {each.key: [] for each in SERIES}
    for number, run in enumerate(runs):
        of_run: dict[str, Any] = {"color": COLORS[number % len(COLORS)], "legendgroup": run.name}
        losses += _curves(run.name, run.steps, "loss", noisy=True, **of_run)
        for name, scores in validation_scores(run).items():
            title = f"{run.name}, validation: {name}"
            losses += _curves(title, scores, "loss", mode="markers", showlegend=False, **of_run)
        for each in SERIES:
            of_series[each.key] += _of_series(run.name, run, each, showlegend=False, **of_run)
    x = {"tickformat": AXES["step"]["tickformat"], "title": {"text": AXES["step"]["title"]}}
    loss = Panel("Loss (nats per token; markers: validation)", losses, x, {}, height=360)
    panels = [panel_of(each, of_series[each.key]) for each in SERIES]
    return draw([[loss], *in_pairs(panels)], meta={"axes": AXES, "marks": {axis: [] for axis in AXES}})


def panel_of(series: Series, traces: list[go.Scatter]) -> Panel:
    title = f"{series.title} ({series.unit})" if series.unit else series.title
    return Panel(title, traces, _x_axis(), _y_axis(series.ticks, series.is_log) | {"rangemode": "tozero"})


def _y_axis(ticks: str, is_log: bool) -> dict[str, Any]:
    return {"tickformat": ticks} | ({"type": "log", "nticks": 3} if is_log else {"type": "linear"})


def in_pairs(panels: list[Panel]) -> list[list[Panel]]:
    """Rows of two; the last row says what its axis is, and a panel without a neighbour has the whole width."""
    pairs = [panels[number : number + 2] for number in range(0, len(panels), 2)]
    for panel in pairs[-1]:
        panel.x["title"] = {"text": AXES["step"]["title"]}
    return pairs


def first_smoothing(runs: Sequence[Run]) -> str:
    """How the page begins: short curves as they are."""
    return SMOOTHED_AT_FIRST if any(len(run.steps) >= SMOOTHED_FROM for run in runs) else "off"


def validation_scores(run: Run) -> dict[str, list[dict[str, Any]]]:
    """The scores of each validation set in the order of their steps, with the place of each on every axis."""
    scores: dict[str, list[dict[str, Any]]] = {}
    for record in run.validations:
        for name, values in record["validation"].items():
            scores.setdefault(name, []).append({axis: record[axis] for axis in AXES} | values)
    return scores


def _x_axis() -> dict[str, Any]:
    return {"matches": "x", "tickformat": AXES["step"]["tickformat"]}


def _of_series(name: str, run: Run, series: Series, **options: Any) -> list[go.Scatter]:
    return _curves(name, run.steps, series.key, series.factor, noisy=series.is_noisy, **options)


def _of_sources(run: Run) -> list[Panel]:
    """The validation loss by source, where a set has several."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for name, scores in validation_scores(run).items():
        for score in scores:
            for source, loss in score.get("loss_by_source", {}).items():
                curves.setdefault(f"{source} ({name})", []).append(score | {"loss": loss})
    return _named_curves(OF_SOURCES, curves, "loss")


def _of_groups(run: Run) -> list[Panel]:
    """The gradient norm of each group of parameters that the optimizer has, where it has several."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for record in run.layers:
        for group, norm in record.get("groups", {}).items():
            curves.setdefault(group, []).append(record | {"grad_norm": norm})
    return _named_curves(OF_GROUPS, curves, "grad_norm", is_log=True)


def _named_curves(title: str, curves: dict[str, list[dict[str, Any]]], key: str, is_log: bool = False) -> list[Panel]:
    if not curves:
        return []
    traces: list[go.Scatter] = []
    for number, (name, records) in enumerate(curves.items()):
        traces += _curves(name, records, key, color=COLORS[(number + 2) % len(COLORS)])  # training has the first two
    return [Panel(title, traces, _x_axis(), _y_axis("~g", is_log))]


def _losses(run: Run) -> list[go.Scatter]:
    traces = _curves("training", run.steps, "loss", noisy=True)
    loss, objective = (_values(run.steps, key) for key in ("loss", "objective"))
    if not np.allclose(objective, loss, rtol=1e-6, equal_nan=True):
        traces += _curves("objective", run.steps, "objective", color=COLORS[4], visible="legendonly")
    for number, (name, scores) in enumerate(validation_scores(run).items()):
        color = COLORS[1 + number % (len(COLORS) - 1)]
        traces += _curves(f"validation: {name}", scores, "loss", color=color, mode="lines+markers")
    return traces


def _of_adapters(run: Run) -> list[Panel]:
    """What each adapter made of its targets, and how many targets, of each source too; none where there are no adapters."""
    shown = [(title, [record.get(key, {}) for record in run.steps], ticks) for title, key, ticks in ADAPTER_PANELS]
    of_sources = [record.get("adapter_shares_of_sources", {}) for record in run.steps]
    for source in dict.fromkeys(name for record in of_sources for name in record):
        title = f"Share of the targets of {html.escape(source)} that each adapter made"
        shown.append((title, [record.get(source, {}) for record in of_sources], "~%"))
    panels: list[Panel] = []
    for title, values, ticks in shown:
        traces = []
        names = dict.fromkeys(name for of_step in values for name in of_step)
        for number, name in enumerate(names):
            records = [record | {name: of_step.get(name)} for record, of_step in zip(run.steps, values, strict=True)]
            group = {"color": COLORS[number % len(COLORS)], "legendgroup": name, "showlegend": not panels}
            traces += _curves(name, records, name, **group)
        if names:
            panels.append(Panel(title, traces, _x_axis(), {"tickformat": ticks, "rangemode": "tozero"}))
    return panels


def _events(run: Run) -> list[go.Scatter]:
    """A strip with one line a kind of event, details on hovering."""
    traces = []
    for kind in dict.fromkeys(event["event"] for event in run.events):
        events = [event for event in run.events if event["event"] == kind]
        color = EVENT_COLORS.get(kind, COLORS[4])
        traces.append(
            go.Scatter(
                **_places(events),
                y=[kind] * len(events),
                text=[_event_text(event) for event in events],
                hovertemplate="step %{customdata}: %{text}<extra></extra>",
                mode="markers",
                marker={"symbol": "line-ns-open", "size": 11, "color": color, "line": {"width": 2}},
                showlegend=False,
                name=kind,
            )
        )
    return traces


def _line_across_the_loss(event: dict[str, Any]) -> dict[str, Any]:
    """Of anything but a checkpoint."""
    line = {"color": EVENT_COLORS.get(event["event"], COLORS[4]), "width": 1, "dash": "dot"}
    return {
        "type": "line",
        "x0": event["step"],
        "x1": event["step"],
        "y0": 0,
        "y1": 1,
        "yref": "y domain",
        "line": line,
    }


def _event_text(event: dict[str, Any]) -> str:
    details = [
        f"{key} {value}" for key, value in event.items() if key not in ("step", "event", "time", "tokens", "hours")
    ]
    return html.escape(", ".join([event["event"], *details]))


def _curves(
    name: str,
    records: Sequence[dict[str, Any]],
    key: str,
    factor: float = 1.0,
    *,
    noisy: bool = False,
    color: str = COLORS[0],
    **options: Any,
) -> list[go.Scatter]:
    """The values as they are and, where they are noisy, a trace for each degree of smoothing; the page shows one of these."""
    y = _values(records, key) * factor
    smooth = noisy and len(y) >= SMOOTHED_FROM
    raw = {"role": "raw"} if noisy else {}
    opacity = 0.3 if smooth else 1
    traces = [_line(name, records, y, _visible_points(y), color, raw, opacity=opacity, **options)]
    for degree, share in SMOOTHING.items() if noisy else ():
        keep = np.unique(np.linspace(0, len(y) - 1, POINTS_WHEN_SMOOTH).astype(int)) if len(y) else np.arange(0)
        visible = smooth and degree == SMOOTHED_AT_FIRST
        role = {"role": degree}
        traces.append(
            _line(f"{name}, smoothed", records, smoothed(y, share), keep, color, role, visible=visible, **options)
        )
    return traces


def _line(
    name: str,
    records: Sequence[dict],
    y: np.ndarray,
    keep: np.ndarray,
    color: str,
    meta: dict[str, Any],
    **options: Any,
) -> go.Scatter:
    mode = options.pop("mode", "lines" if len(y) > FEW_POINTS else "lines+markers")
    hover = "step %{customdata}: %{y:.5~g}<extra>" + html.escape(name) + "</extra>"
    places = _places([records[number] for number in keep])
    places["meta"] |= meta
    line = {"color": color, "width": 1.5}
    return go.Scatter(**places, y=y[keep], name=name, mode=mode, line=line, hovertemplate=hover, **options)


def _places(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Properties of a trace: where its points are on each axis. The page copies `x` to `customdata` before it draws."""
    others = {"tokens": [record["tokens"] for record in records]}
    others["hours"] = [round(record["hours"], 6) for record in records]
    return {"x": np.array([record["step"] for record in records], dtype=np.int64), "meta": {"x": others}}


def _values(records: Sequence[dict[str, Any]], key: str) -> np.ndarray:
    """Float64 [N]; a missing or non-finite value is NaN, a gap in the curve."""
    values = [record.get(key) for record in records]
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def _visible_points(y: np.ndarray) -> np.ndarray:
    """Indices of the points to draw: all, or the lowest, the highest and any gap of each of many equal stretches."""
    if len(y) <= POINTS_PER_CURVE:
        return np.arange(len(y))
    kept = {0, len(y) - 1}
    for stretch in np.array_split(np.arange(len(y)), POINTS_PER_CURVE // 3):
        values, gaps = y[stretch], np.isnan(y[stretch])
        if not gaps.all():
            kept |= {int(stretch[np.nanargmin(values)]), int(stretch[np.nanargmax(values)])}
        if gaps.any():
            kept.add(int(stretch[gaps.argmax()]))
    return np.array(sorted(kept))


def smoothed(y: np.ndarray, share: float) -> np.ndarray:
    """Mean over about that share of the curve around each point, without gaps; the window narrows towards both ends."""
    index = np.arange(len(y))
    half = np.minimum(max(1, round(len(y) * share / 2)), np.minimum(index, index[::-1]))
    gaps = np.isnan(y)
    sums, counts = (np.concatenate([[0.0], np.cumsum(part)]) for part in (np.where(gaps, 0.0, y), ~gaps))
    first, last = index - half, index + half + 1
    with np.errstate(invalid="ignore"):
        return (sums[last] - sums[first]) / (counts[last] - counts[first])
