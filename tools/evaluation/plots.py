"""The part of the report that shows what `tools.evaluate` measured: whether the model uses the length of its documents.

Of each data set and split the newest checkpoint's figures are drawn; older ones wait in the legend.
"""

import html
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from tools.evaluation.tables import PASSKEY_FIGURES, bucket_name, passkey_grid, passkey_title, whole_set
from tools.panels import COLORS, Drawing, Panel, draw

HEAT = ((0.0, "rgba(59,130,246,0.05)"), (1.0, "rgba(59,130,246,0.95)"))


def figure(evaluations: list[dict[str, Any]]) -> Drawing | None:
    """Everything but the scores, which are a table; None where nothing of it was measured."""
    maps = [[panel] for panel in _gain_maps(evaluations)]
    rows = [_positions(evaluations), _gains(evaluations), *maps, *_passkeys(evaluations)]
    return draw(drawn) if (drawn := [row for row in rows if row]) else None


def score_rows(evaluations: list[dict[str, Any]]) -> list[list[str]]:
    """Cells of a table: checkpoint, data and split, source, loss, bits per byte, targets."""
    return [
        [
            found["checkpoint"],
            _data(found),
            source,
            f"{row['loss']:.4f}",
            f"{row['bits_per_byte']:.4f}" if "bits_per_byte" in row else "",
            f"{row['targets']:,}",
        ]
        for found in evaluations
        for source, row in found.get("scores", {}).items()
    ]


def _data(found: dict[str, Any]) -> str:
    return f"{Path(found['data']).name} {found['split']}"


def _newest(evaluations: list[dict[str, Any]], analysis: str) -> dict[str, dict[str, Any]]:
    """The last evaluation of each data set and split that has the analysis."""
    return {found["fingerprint"] + found["split"]: found for found in evaluations if analysis in found}


def _lines(evaluations: list[dict[str, Any]], analysis: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Rows and style of a line for each evaluation and source."""
    newest = list(map(id, _newest(evaluations, analysis).values()))
    colors: dict[tuple[str, str, str], int] = {}
    for found in evaluations:
        for source, rows in found.get(analysis, {}).items():
            is_newest = id(found) in newest
            key = found["fingerprint"], found["split"], source
            color = COLORS[colors.setdefault(key, len(colors)) % len(COLORS)]
            name = html.escape(f"{source}, {_data(found)}, {found['checkpoint']}")
            shown = {"visible": True if is_newest else "legendonly", "legendgroup": name, "name": name}
            dash = "solid" if is_newest else "dot"
            yield rows, shown | {"mode": "lines+markers", "line": {"color": color, "width": 1.5, "dash": dash}}


def _errors(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Bars of two standard errors."""
    return {"type": "data", "array": [2 * (row["standard_error"] or 0) for row in rows], "thickness": 1, "width": 3}


def _positions(evaluations: list[dict[str, Any]]) -> list[Panel]:
    traces = [
        go.Scatter(
            x=[row["first"] for row in rows],
            y=[row["loss"] for row in rows],
            text=[f"{bucket_name(row)}, {row['targets']:,} targets" for row in rows],
            hovertemplate="position %{text}: %{y:.4f}<extra></extra>",
            error_y=_errors(rows),
            **shown,
        )
        for rows, shown in _lines(evaluations, "positions")
    ]
    title = "Loss by position in the piece of a document (nats; bars: two standard errors)"
    return [Panel(title, traces, _log_axis("tokens of the same piece before the target"), {})] if traces else []


def _gains(evaluations: list[dict[str, Any]]) -> list[Panel]:
    by_chunk = [
        go.Scatter(
            x=[row["limit"] for row in rows],
            y=[row["gain"] for row in rows],
            hovertemplate="chunks of %{x} tokens: %{y:.4f}<extra></extra>",
            error_y=_errors(rows),
            showlegend=False,
            **shown,
        )
        for rows, shown in _lines(evaluations, "context_gain")
    ]
    by_position = [
        _gain_by_position(found, limit, COLORS[-1 - number % len(COLORS)])
        for found in _newest(evaluations, "context_gain").values()
        for number, limit in enumerate(whole_set(found["context_gain"]))
    ]
    if not by_chunk:
        return []
    zero = {"rangemode": "tozero"}
    return [
        Panel("Gain from all context over chunks (nats)", by_chunk, _log_axis("tokens of a chunk"), zero),
        Panel("The same by position", by_position, _log_axis("tokens before the target"), zero),
    ]


def _gain_maps(evaluations: list[dict[str, Any]]) -> list[Panel]:
    """Position by chunk, of each data set and split where several chunks were measured; all sources."""
    panels = []
    for found in _newest(evaluations, "context_gain").values():
        limits = whole_set(found["context_gain"])
        if len(limits) < 2:
            continue
        names = list(dict.fromkeys(bucket_name(row) for limit in limits for row in limit["positions"]))
        gains = [
            {bucket_name(row): row["gain"] for row in limit["positions"] if row["last"] > limit["limit"]}
            for limit in limits
        ]
        trace = go.Heatmap(
            x=[f"{limit['limit']:,}" for limit in limits],
            y=names,
            z=[[of_limit.get(name) for of_limit in gains] for name in names],
            colorscale=HEAT,
            showscale=False,
            hoverongaps=False,
            texttemplate="%{z:.3f}",
            hovertemplate="position %{y}, chunks of %{x}: %{z:.4f}<extra></extra>",
        )
        x = {"type": "category", "showgrid": False, "title": {"text": "tokens of a chunk"}}
        y = {"type": "category", "showgrid": False, "title": {"text": "tokens before the target"}}
        title = f"Gain by position and chunk (nats), {html.escape(_data(found))}, {html.escape(found['checkpoint'])}"
        panels.append(Panel(title, [trace], x, y, height=max(160, 20 * len(names))))
    return panels


def _gain_by_position(found: dict[str, Any], limit: dict[str, Any], color: str) -> go.Scatter:
    """Beyond the first chunk, which sees all before it anyway; all sources."""
    rows = [row for row in limit["positions"] if row["last"] > limit["limit"]]
    return go.Scatter(
        x=[row["first"] for row in rows],
        y=[row["gain"] for row in rows],
        text=[bucket_name(row) for row in rows],
        hovertemplate="position %{text}: %{y:.4f}<extra></extra>",
        error_y=_errors(rows),
        mode="lines+markers",
        name=html.escape(f"gain over chunks of {limit['limit']:,}, {_data(found)}"),
        line={"color": color, "width": 1.5},
    )


def _passkeys(evaluations: list[dict[str, Any]]) -> list[list[Panel]]:
    """A row of three heat maps for each data set and split."""
    return [[_heat_map(found, name) for name in PASSKEY_FIGURES] for found in _newest(evaluations, "passkey").values()]


def _heat_map(found: dict[str, Any], name: str) -> Panel:
    lengths, depths, values = passkey_grid(found["passkey"], name)
    trace = go.Heatmap(
        x=[f"{length:,}" for length in lengths],
        y=[f"{depth:g}" for depth in depths],
        z=[list(column) for column in zip(*values, strict=True)],
        zmin=0,
        zmax=max(1.0, *map(max, values)) if name == "nll_drop" else 1.0,
        colorscale=HEAT,
        showscale=False,
        texttemplate="%{z:.2f}",
        hovertemplate="%{x} tokens, key at %{y}: %{z:.3f}<extra></extra>",
    )
    title = passkey_title(found["passkey"], name).capitalize()
    x = {"type": "category", "showgrid": False, "title": {"text": "tokens of the text"}}
    y: dict[str, Any] = {"type": "category", "autorange": "reversed", "showgrid": False}
    if name == "exact_match":
        title = f"Pass key, {html.escape(_data(found))}, {html.escape(found['checkpoint'])}<br>{title}"
        y["title"] = {"text": "depth of the key"}
    return Panel(title, [trace], x, y)


def _log_axis(title: str) -> dict[str, Any]:
    return {"type": "log", "tickvals": [2**k for k in range(24)], "title": {"text": title}, "tickformat": ",d"}
