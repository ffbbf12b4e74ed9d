"""Plots in rows, in two arrangements: as given for a wide page, one below the other for a narrow one; light and dark alike."""

import json
import textwrap
from typing import Any, NamedTuple

import plotly.graph_objects as go

GRID = "rgba(128,128,128,0.18)"
COLORS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#06b6d4", "#ec4899", "#84cc16")
WIDE_LETTERS, NARROW_LETTERS = 80, 38
"""That fit in a title over the whole width of 700 and of 360 pixels."""
TITLE_PIXELS, LINE_PIXELS, TICK_PIXELS = 12, 17, 30
GAP = 0.08


class Panel(NamedTuple):
    title: str
    """May be empty."""
    traces: list[go.Scatter | go.Heatmap]
    x: dict[str, Any]
    """Properties of the axis; likewise `y`."""
    y: dict[str, Any]
    height: int = 190
    """Of the plot alone, in pixels."""


class Drawing(NamedTuple):
    """The same traces on the same axes in both."""

    wide: go.Figure
    narrow: go.Figure

    def to_json(self) -> str:
        """`{"data", "layouts": {"wide", "narrow"}}` for plotly.js, in which no `<` can end the element that holds it."""
        wide, narrow = (json.loads(figure.to_json()) for figure in self)
        found = {"data": wide["data"], "layouts": {"wide": wide["layout"], "narrow": narrow["layout"]}}
        return json.dumps(found, separators=(",", ":")).replace("<", "\\u003c")


def draw(rows: list[list[Panel]], **layout: Any) -> Drawing:
    """`layout`: further properties of both arrangements."""
    panels = [panel for row in rows for panel in row]
    wide = _arrange(rows, WIDE_LETTERS, {"l": 85, "r": 20})
    narrow = _arrange([[panel] for panel in panels], NARROW_LETTERS, {"l": 74, "r": 12})
    data = [trace for number, panel in enumerate(panels, 1) for trace in _on_axes(panel.traces, number)]
    return Drawing(*(go.Figure(data, _styled(arrangement, layout)) for arrangement in (wide, narrow)))


def _on_axes(traces: list[go.Scatter | go.Heatmap], number: int) -> list[go.Scatter | go.Heatmap]:
    return [trace.update(xaxis=f"x{number}", yaxis=f"y{number}") for trace in traces]


def _arrange(rows: list[list[Panel]], letters: int, margin: dict[str, int]) -> dict[str, Any]:
    """Layout properties: where every axis and title is, and the height of it all. Titles lie inside of the plot's area.

    So nothing but the legend is above that area, which moves down as far as the legend needs.
    """
    titles = [[_wrapped(panel.title, letters // len(row)) for panel in row] for row in rows]
    heads = [
        max(LINE_PIXELS * (title.count("<br>") + 1) + TITLE_PIXELS if title else 0 for title in row) for row in titles
    ]
    feet = [TICK_PIXELS + LINE_PIXELS * any("title" in panel.x for panel in row) for row in rows]
    bodies = [max(panel.height for panel in row) for row in rows]
    height, top, number = sum(heads) + sum(bodies) + sum(feet), 0, 0
    layout: dict[str, Any] = {"annotations": [], "height": height + LINE_PIXELS}
    for row, texts, head, body, foot in zip(rows, titles, heads, bodies, feet, strict=True):
        above, below = 1 - (top + head) / height, 1 - (top + head + body) / height
        for place, (panel, text) in enumerate(zip(row, texts, strict=True)):
            number += 1
            width = (1 - GAP * (len(row) - 1)) / len(row)
            left = place * (width + GAP)
            layout[f"xaxis{number}"] = panel.x | {"domain": [left, min(1, left + width)], "anchor": f"y{number}"}
            layout[f"yaxis{number}"] = panel.y | {"domain": [max(0, below), above], "anchor": f"x{number}"}
            if text:
                place_of_title = {"x": left, "xanchor": "left", "xshift": -0.6 * margin["l"], "align": "left"}
                place_of_title |= {"xref": "paper", "yref": "paper", "y": above, "yanchor": "bottom", "yshift": 3}
                layout["annotations"].append(place_of_title | {"text": text, "showarrow": False})
        top += head + body + foot
    return layout | {"margin": margin | {"t": 0, "b": LINE_PIXELS}}


def _wrapped(text: str, letters: int) -> str:
    lines = [
        textwrap.wrap(line, letters, break_long_words=False, break_on_hyphens=False) for line in text.split("<br>")
    ]
    return "<br>".join(part for line in lines for part in line)


def _styled(arrangement: dict[str, Any], layout: dict[str, Any]) -> go.Layout:
    """Grid, fonts and transparent backgrounds."""
    found = go.Layout(
        arrangement | layout,
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": "#868e99", "size": 12, "family": "system-ui, sans-serif"},
        legend={"orientation": "h", "xref": "container", "x": 0, "yref": "container", "y": 1, "yanchor": "top"},
        hovermode="closest",
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#868e99", "activecolor": COLORS[0]},
    )
    for name in arrangement:
        if name.startswith(("xaxis", "yaxis")):
            found[name].update(gridcolor=GRID, zeroline=False, title={"standoff": 4, "font": {"size": 12}})
    return found
