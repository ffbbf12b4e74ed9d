"""What all plots of a report have in common, in light and in dark."""

import plotly.graph_objects as go

GRID = "rgba(128,128,128,0.18)"
COLORS = ("#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#06b6d4", "#ec4899", "#84cc16")


def style(plot: go.Figure, height: int) -> None:
    """Grid, fonts and transparent backgrounds; `height` in pixels."""
    plot.update_xaxes(gridcolor=GRID, zeroline=False)
    plot.update_yaxes(gridcolor=GRID, zeroline=False)
    plot.update_annotations(font_size=14)
    plot.update_layout(
        template="none",
        height=height,
        margin={"l": 85, "r": 20, "t": 50, "b": 50},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"color": "#868e99", "size": 12, "family": "system-ui, sans-serif"},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1.0, "yanchor": "bottom"},
        hovermode="closest",
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": "#868e99", "activecolor": COLORS[0]},
    )
