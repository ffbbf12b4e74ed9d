"""A run as one HTML page that needs no network: `python -m tools.report RUN -o report.html`.

Reads RUN/metrics.jsonl and RUN/run.json, and what tools.evaluate kept in RUN/evaluations; the run may still be going on.
The page carries its own compressed copy of plotly.js, so it opens from disk on a machine that is cut off from everything.
"""

import base64
import gzip
import html
import json
import os
import statistics
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from data_prep.command import CommandParser
from tools import evaluation_files, evaluation_plots
from tools.plot_style import COLORS, style
from training.metrics import METRICS_FILE, with_prefix
from training.records import read_records

FACTS_FILE = "run.json"
POINTS_PER_CURVE = 3000
FEW_POINTS = 30
TEMPLATE = Path(__file__).with_name("report.html")
EVENT_COLORS = {"resume": "#f59e0b", "skip": "#ef4444", "checkpoint": "#9ca3af"}
# title, record key, factor from the record's unit to the axis's, format of the axis's ticks, axis type
PANELS = (
    ("Learning rate", "learning_rate", 1.0, ".2~e", "linear"),
    ("Gradient norm before clipping", "grad_norm", 1.0, "~g", "log"),
    ("Tokens per second", "tokens_per_second", 1.0, "~s", "linear"),
    ("Share of peak FLOP/s (MFU)", "mfu", 1.0, "~%", "linear"),
    ("Time waiting for data", "data_wait_fraction", 1.0, "~%", "linear"),
    ("Peak memory of the first rank (GiB)", "memory_bytes", 2.0**-30, "~g", "linear"),
)


class Run(NamedTuple):
    name: str
    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    events: list[dict[str, Any]]
    facts: dict[str, Any]
    evaluations: list[dict[str, Any]]


def read_run(run_dir: Path) -> Run:
    """Raises ValueError, in one sentence, where there is no run or its files are damaged."""
    metrics, facts = run_dir / METRICS_FILE, run_dir / FACTS_FILE
    if not metrics.is_file():
        raise ValueError(f"{metrics} does not exist: give the folder that train.py was told to write (--output)")
    records = read_records(metrics)
    try:
        known = json.loads(facts.read_bytes()) if facts.exists() else {}
    except ValueError as error:
        raise ValueError(f"{facts} is not valid JSON ({error})") from None
    return Run(
        run_dir.resolve().name,
        [record for record in records if "loss" in record and "event" not in record],
        [record for record in records if "validation" in record],
        [record for record in records if "event" in record],
        known if isinstance(known, dict) else {"run": known},
        evaluation_files.read(run_dir),
    )


def figure(run: Run) -> go.Figure:
    """All curves over the optimizer step, in one figure whose panels zoom together."""
    titles = ["Loss (nats per token)", "", *(title for title, *_ in PANELS)]
    wide, pair = [{"colspan": 2}, None], [{}, {}]
    plot = make_subplots(
        rows=5,
        cols=2,
        specs=[wide, wide, pair, pair, pair],
        row_heights=[0.37, 0.06, 0.19, 0.19, 0.19],
        vertical_spacing=0.055,
        horizontal_spacing=0.1,
        subplot_titles=titles,
    )
    for number, annotation in enumerate(plot.layout.annotations):
        left = number % 2 == 1 or number == 0
        annotation.update(x=0 if left else 0.55, xanchor="left")
    _add_losses(plot, run)
    _add_events(plot, run)
    for number, (title, key, factor, tick_format, kind) in enumerate(PANELS):
        place = {"row": 3 + number // 2, "col": 1 + number % 2}
        x, y = _curve(run.steps, key)
        plot.add_trace(_line(title, x, y * factor, COLORS[0], showlegend=False), **place)
        plot.update_yaxes(tickformat=tick_format, type=kind, rangemode="tozero", **place)
    plot.update_xaxes(matches="x", showticklabels=False, tickformat=",d")
    plot.layout.xaxis.matches = None
    plot.update_xaxes(title_text="optimizer step", showticklabels=True, row=5)
    plot.update_xaxes(showticklabels=True, row=2)
    style(plot, height=1150)
    return plot


def page(run: Run) -> str:
    """The whole page. Values from the run's files are escaped: a name cannot become markup or a script."""
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(run.name),
        status=html.escape(_status(run)),
        tiles="".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in _tiles(run)),
        validation=_validation_table(run),
        scores=_score_table(run),
        facts="".join(_facts_section(name, value) for name, value in run.facts.items()),
        figure=_script(figure(run)),
        evaluations=_script(evaluation_plots.figure(run.evaluations)),
        plotly=_compressed_plotly(),
    )


def _script(plot: go.Figure | None) -> str:
    """JSON that cannot end the script element that holds it."""
    return "null" if plot is None else plot.to_json().replace("<", "\\u003c")


def _add_losses(plot: go.Figure, run: Run) -> None:
    x, loss = _curve(run.steps, "loss")
    smooth = len(loss) >= 100
    plot.add_trace(_line("training", x, loss, COLORS[0], opacity=0.35 if smooth else 1), row=1, col=1)
    if smooth:
        plot.add_trace(_line("training, smoothed", x, _smoothed(loss), COLORS[0]), row=1, col=1)
    x, objective = _curve(run.steps, "objective")
    if not np.allclose(objective, loss, rtol=1e-6, equal_nan=True):
        plot.add_trace(_line("objective", x, objective, COLORS[4], visible="legendonly"), row=1, col=1)
    for number, (name, scores) in enumerate(_validation_scores(run).items()):
        x, loss = _curve(scores, "loss")
        color = COLORS[1 + number % (len(COLORS) - 1)]
        plot.add_trace(_line(f"validation: {name}", x, loss, color, mode="lines+markers"), row=1, col=1)


def _add_events(plot: go.Figure, run: Run) -> None:
    """A strip with one line a kind of event, details on hovering; anything but a checkpoint also crosses the loss."""
    for kind in dict.fromkeys(event["event"] for event in run.events):
        events = [event for event in run.events if event["event"] == kind]
        color = EVENT_COLORS.get(kind, COLORS[4])
        plot.add_trace(
            go.Scatter(
                x=[event["step"] for event in events],
                y=[kind] * len(events),
                text=[_event_text(event) for event in events],
                hovertemplate="step %{x}: %{text}<extra></extra>",
                mode="markers",
                marker={"symbol": "line-ns-open", "size": 11, "color": color, "line": {"width": 2}},
                showlegend=False,
                name=kind,
            ),
            row=2,
            col=1,
        )
        if kind != "checkpoint":
            for event in events[-POINTS_PER_CURVE // 10 :]:
                plot.add_vline(event["step"], line={"color": color, "width": 1, "dash": "dot"}, row=1, col=1)
    plot.update_yaxes(type="category", showgrid=False, dtick=1, row=2, col=1)


def _event_text(event: dict[str, Any]) -> str:
    details = [f"{key} {value}" for key, value in event.items() if key not in ("step", "event", "time")]
    return html.escape(", ".join([event["event"], *details]))


def _line(name: str, x: np.ndarray, y: np.ndarray, color: str, **options: Any) -> go.Scatter:
    keep = _visible_points(y)
    mode = options.pop("mode", "lines" if len(y) > FEW_POINTS else "lines+markers")
    hover = "step %{x}: %{y:.5~g}<extra>" + html.escape(name) + "</extra>"
    line = {"color": color, "width": 1.5}
    return go.Scatter(x=x[keep], y=y[keep], name=name, mode=mode, line=line, hovertemplate=hover, **options)


def _curve(records: Sequence[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps int64 [N] and values float64 [N]; a missing or non-finite value is NaN, a gap in the curve."""
    values = [record.get(key) for record in records]
    x = np.array([record["step"] for record in records], dtype=np.int64)
    return x, np.array([np.nan if value is None else value for value in values], dtype=np.float64)


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


def _smoothed(y: np.ndarray) -> np.ndarray:
    """Mean over about a fiftieth of the curve around each point, without gaps; the window narrows towards both ends."""
    index = np.arange(len(y))
    half = np.minimum(max(1, len(y) // 100), np.minimum(index, index[::-1]))
    gaps = np.isnan(y)
    sums, counts = (np.concatenate([[0.0], np.cumsum(part)]) for part in (np.where(gaps, 0.0, y), ~gaps))
    first, last = index - half, index + half + 1
    with np.errstate(invalid="ignore"):
        return (sums[last] - sums[first]) / (counts[last] - counts[first])


def _validation_scores(run: Run) -> dict[str, list[dict[str, Any]]]:
    scores: dict[str, list[dict[str, Any]]] = {}
    for record in run.validations:
        for name, values in record["validation"].items():
            scores.setdefault(name, []).append({"step": record["step"], **values})
    return scores


def _status(run: Run) -> str:
    if not run.steps:
        return "no step logged yet"
    last = run.steps[-1]
    when = datetime.fromtimestamp(last["time"], UTC).strftime("%Y-%m-%d %H:%M UTC")
    if not last["eta_seconds"]:
        return f"finished at step {last['step']:,} on {when}"
    total = last["step"] + round(last["eta_seconds"] / last["step_seconds"])
    left = timedelta(seconds=round(last["eta_seconds"]))
    return f"step {last['step']:,} of {total:,} ({last['step'] / total:.0%}) on {when}, {left} to go"


def _tiles(run: Run) -> list[tuple[str, str]]:
    if not run.steps:
        return []
    last = run.steps[-1]
    tiles = [("training loss", _number(last["loss"]))]
    for name, scores in _validation_scores(run).items():
        losses = [score["loss"] for score in scores if score["loss"] is not None]
        if losses:
            tiles.append((f"best {name} loss", _number(min(losses))))
    tiles += [
        ("tokens", with_prefix(last["tokens"])),
        ("tokens per second", with_prefix(_median(run, "tokens_per_second"))),
        ("of peak", f"{_median(run, 'mfu'):.1%}"),
        ("waiting for data", f"{_median(run, 'data_wait_fraction'):.1%}"),
        ("skipped steps", str(last["skipped_steps"])),
        ("resumes", str(sum(event["event"] == "resume" for event in run.events))),
    ]
    return tiles


def _median(run: Run, key: str) -> float:
    return statistics.median([record[key] for record in run.steps if record[key] is not None] or [0.0])


def _validation_table(run: Run) -> str:
    rows = []
    for name, scores in _validation_scores(run).items():
        best = min(scores, key=lambda score: float("inf") if score["loss"] is None else score["loss"])
        cells = [name]
        for score in (best, scores[-1]):
            cells += [f"{score['step']:,}", _number(score["loss"]), _number(score.get("bits_per_byte"))]
        rows.append(cells)
    return _table(
        ["set", *(f"{when} {what}" for when in ("best", "last") for what in ("step", "loss", "bits/byte"))], rows
    )


def _score_table(run: Run) -> str:
    head = ["checkpoint", "data", "source", "loss", "bits/byte", "targets"]
    return _table(head, evaluation_plots.score_rows(run.evaluations))


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Empty without rows, which hides its section."""
    if not rows:
        return ""
    lines = [_cells("th", head), *(_cells("td", row) for row in rows)]
    return f"<table class=numbers><tr>{'</tr><tr>'.join(lines)}</tr></table>"


def _cells(tag: str, texts: list[str]) -> str:
    return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)


def _facts_section(name: str, value: Any) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(key)}</th><td>{html.escape(text)}</td></tr>" for key, text in _flattened(value, "")
    )
    return f"<details><summary>{html.escape(name)}</summary><table>{rows}</table></details>"


def _flattened(value: Any, prefix: str) -> list[tuple[str, str]]:
    if isinstance(value, dict) and value:
        return [row for key, item in value.items() for row in _flattened(item, f"{prefix}.{key}" if prefix else key)]
    return [(prefix, value if isinstance(value, str) else json.dumps(value))]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


@cache
def _compressed_plotly() -> str:
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def write_report(run_dir: Path, output: Path) -> None:
    """Writes the page in one rename, so a browser that reloads it never sees half of it."""
    text = page(read_run(run_dir))
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(output)
    finally:
        temporary.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandParser(prog="python -m tools.report", description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a training run, finished or going on")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="page to write (default: RUN/report.html)")
    options = parser.parse_args(arguments)
    output = options.output or options.run / "report.html"
    try:
        write_report(options.run, output)
    except (ValueError, OSError) as error:
        print(f"tools.report: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(f"{output} ({output.stat().st_size / 2**20:.1f} MiB): open it in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(main())
