"""What the layers of a run were like over its steps, as heat maps: a row for each layer, a column for each step looked at."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import plotly.graph_objects as go

from tools.evaluation.plots import HEAT
from tools.panels import Panel
from tools.run_history import Run
from tools.shown import LAYER_FIGURES

COLUMNS = 300
"""At most; more steps than that are thinned out evenly."""


def layer_panels(run: Run, x_axis: Callable[[], dict[str, Any]]) -> list[Panel]:
    """One for each figure; none where the run has none."""
    records = (
        [run.layers[i] for i in np.unique(np.linspace(0, len(run.layers) - 1, COLUMNS).astype(int))]
        if run.layers
        else []
    )
    panels = []
    for kind, (title, is_log) in LAYER_FIGURES.items():
        values = [record["layers"].get(kind, {}) for record in records]
        if names := list(dict.fromkeys(name for of_step in values for name in of_step)):
            scale = " (logarithmic)" if is_log else ""
            trace = _heat_map(records, [[of_step.get(name) for of_step in values] for name in names], names, is_log)
            y = {"type": "category", "showgrid": False, "ticks": ""}
            panels.append(
                Panel(
                    f"{title} by layer{scale}",
                    [trace],
                    x_axis() | {"ticks": ""},
                    y,
                    height=max(120, min(16 * len(names), 320)),
                )
            )
    return panels


def _heat_map(
    records: list[dict[str, Any]], values: list[list[float | None]], names: list[str], is_log: bool
) -> go.Heatmap:
    """`values` [layers][steps]. A figure that is not finite, or has no logarithm, is a hole."""
    meta = {"x": {axis: [round(record[axis], 6) for record in records] for axis in ("tokens", "hours")}}
    return go.Heatmap(
        x=np.array([record["step"] for record in records], dtype=np.int64),
        y=[_short(name) for name in names],
        z=[[_color(value, is_log) for value in of_layer] for of_layer in values],
        customdata=values,
        meta=meta,
        colorscale=HEAT,
        showscale=False,
        hoverongaps=False,
        hovertemplate="%{y} at %{x}: %{customdata:.4~g}<extra></extra>",
    )


def _color(value: float | None, is_log: bool) -> float | None:
    if value is None or (is_log and value <= 0):
        return None
    return round(math.log10(value) if is_log else value, 4)


def _short(name: str) -> str:
    return name.removeprefix("layers.").removesuffix("_tokens").removeprefix("lm_")
