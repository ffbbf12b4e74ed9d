"""Runs as one HTML page that needs no network: `python -m tools.report RUN [RUN ...] -o report.html`.

Reads RUN/metrics.jsonl, layers.jsonl, run.json and goodput.json, what tools.evaluate kept in RUN/evaluations, and what
tools.generate wrote; a run may still be going on. Of several the same curves are drawn over each other.
The page carries its own compressed copy of plotly.js, so it opens from disk on a machine that is cut off from everything.
"""

import base64
import gzip
import statistics
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs
from pydantic import ValidationError

from console.command import CommandParser
from model.config import ModelConfig
from tools import comparison, run_plots
from tools.evaluation import plots as evaluation_plots
from tools.goodput_bar import bar, launch_rows
from tools.page import details, framed, options_of, table, write_page
from tools.run_history import Run, read_run
from tools.run_plots import validation_scores
from tools.run_sections import planned_rows, samples, steps_section
from training.goodput import share_of
from training.metrics import with_prefix

TEMPLATE = Path(__file__).with_name("report.html")


def page(run: Run) -> str:
    """The whole page. Values from the run's files are escaped: a name cannot become markup or a script."""
    measured = evaluation_plots.figure(run.evaluations)
    body = _body(
        figure=run_plots.figure(run).to_json(),
        degree=run_plots.first_smoothing([run]),
        goodput=bar(run.times),
        launches=table(*launch_rows(run.times)),
        planned=table(*planned_rows(run)),
        steps=steps_section(run),
        validation=_validation_table(run),
        scores=_score_table(run),
        samples=samples(run),
        facts="".join(details(name, value) for name, value in run.facts.items()),
        evaluations="null" if measured is None else measured.to_json(),
    )
    return framed(run.name, _status(run), _head(run), _tiles(run), body)


def comparison_page(runs: Sequence[Run]) -> str:
    """The whole page of several runs with names of their own."""
    tiles = [_tiles(run) for run in runs]
    body = _body(
        figure=run_plots.comparison(runs).to_json(),
        degree=run_plots.first_smoothing(runs),
        goodput=comparison.titled(runs, [bar(run.times) for run in runs]),
        launches="",
        planned=comparison.titled(runs, [table(*planned_rows(run)) for run in runs]),
        steps="",
        validation=table(*comparison.validation_rows(runs)),
        scores=comparison.titled(runs, [_score_table(run) for run in runs]),
        samples=comparison.titled(runs, [samples(run) for run in runs]),
        facts=comparison.differences(runs),
        evaluations="null",
    )
    figures = f"<section>{table(*comparison.figure_rows(runs, tiles))}</section>"
    head = [(run.name, "; ".join(filter(None, [_status(run), _layout_words(run.facts)]))) for run in runs]
    return framed(" · ".join(run.name for run in runs), f"{len(runs)} runs", head, [], figures + body)


def _body(*, degree: str, **parts: str) -> str:
    axes = options_of({name: axis["title"] for name, axis in run_plots.AXES.items()}, "step")
    degrees = options_of({name: name for name in ("off", *run_plots.SMOOTHING)}, degree)
    text = TEMPLATE.read_text(encoding="utf-8")
    return Template(text).substitute(axes=axes, degrees=degrees, plotly=_compressed_plotly(), **parts)


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
    tiles = [("training loss" if last["eta_seconds"] else "final loss", _number(last["loss"]))]
    for name, scores in validation_scores(run).items():
        losses = [score["loss"] for score in scores if score["loss"] is not None]
        if losses:
            tiles.append((f"best {name} loss", _number(min(losses))))
    tiles += [
        ("tokens seen", with_prefix(last["tokens"])),
        ("tokens per second", with_prefix(_median(run, "tokens_per_second"))),
        ("of peak", f"{_median(run, 'mfu'):.1%}"),
        ("waiting for data", f"{_median(run, 'data_wait_fraction'):.1%}"),
        ("skipped steps", str(last["skipped_steps"])),
        ("resumes", str(_resumes(run))),
    ]
    if run.times:
        tiles.append(("goodput", f"{share_of(run.times.seconds):.1%}"))
    return tiles


def _head(run: Run) -> list[tuple[str, str]]:
    """What was trained where and for how long, as far as the run's folder says it."""
    words = {
        "model": _model_words(run.facts.get("recipe", {}).get("model", {})),
        "layout": _layout_words(run.facts),
        "devices of the first host": _device_words(run.facts.get("environment", {})),
        "duration": _duration_words(run),
        "commit": _commit_words(run.facts.get("environment", {}).get("git")),
    }
    return [(name, text) for name, text in words.items() if text]


def _model_words(model: dict[str, Any]) -> str:
    """Empty for a model of other code, whose parameters are not counted here."""
    try:
        config = ModelConfig.model_validate(model)
    except ValidationError:
        return ""
    size = with_prefix(config.num_parameters()).replace("G", "B")
    return f"{size} parameters, {config.num_hidden_layers} layers of width {config.hidden_size}"


def _layout_words(facts: dict[str, Any]) -> str:
    """Of the newest launch. Folders of old code have no ranks in them."""
    if "ds_config" not in facts:
        return ""
    words = [f"ZeRO-{facts['ds_config'].get('zero_optimization', {}).get('stage', 0)}"]
    layout = dict(facts.get("layout", {}))
    if ranks := layout.pop("world_size", None):
        words.append(f"{ranks} rank{'s' * (ranks > 1)}")
    by_keys = ["keys exchanged"] * (layout.pop("exchange", "heads") == "keys")
    return ", ".join([*words, *(f"{name} {size}" for name, size in layout.items() if size > 1), *by_keys])


def _device_words(environment: dict[str, Any]) -> str:
    if devices := environment.get("devices"):
        return ", ".join(f"{devices.count(name)} × {name}" for name in dict.fromkeys(devices))
    if not (processor := environment.get("cpu")):
        return ""
    cores = environment.get("cpu_cores")
    return f"no GPU; {processor}" + (f", {cores} cores" if cores else "")


def _duration_words(run: Run) -> str:
    hours = max((record["hours"] for record in [*run.steps, *run.validations, *run.events]), default=0.0)
    minutes, seconds = divmod(round(hours * 3600), 60)
    text = f"{hours:.1f} hours" if hours >= 1 else f"{minutes} min {seconds} s"
    return f"{text} in {_resumes(run) + 1} launches" if _resumes(run) else text


def _commit_words(git: dict[str, Any] | None) -> str:
    return f"{git['commit'][:12]}{', with changes' if git['dirty'] else ''}" if git else ""


def _resumes(run: Run) -> int:
    return sum(event["event"] == "resume" for event in run.events)


def _median(run: Run, key: str) -> float:
    return statistics.median([record[key] for record in run.steps if record[key] is not None] or [0.0])


def _validation_table(run: Run) -> str:
    rows = []
    for name, scores in validation_scores(run).items():
        best = min(scores, key=lambda score: float("inf") if score["loss"] is None else score["loss"])
        cells = [name]
        for score in (best, scores[-1]):
            cells += [f"{score['step']:,}", _number(score["loss"]), _number(score.get("bits_per_byte"))]
        rows.append(cells)
    return table(
        ["set", *(f"{when} {what}" for when in ("best", "last") for what in ("step", "loss", "bits/byte"))], rows
    )


def _score_table(run: Run) -> str:
    head = ["checkpoint", "data", "source", "loss", "bits/byte", "targets"]
    return table(head, evaluation_plots.score_rows(run.evaluations))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


@cache
def _compressed_plotly() -> str:
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandParser(prog="python -m tools.report", description=__doc__.partition("\n")[0])
    run_help = "folder of a training run, finished or going on; of several to compare them"
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help=run_help)
    output_help = "page to write (default: RUN/report.html; of several runs comparison.html here)"
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help=output_help)
    options = parser.parse_args(arguments)
    if len(options.runs) > 1:
        output = options.output or Path("comparison.html")
        return write_page("tools.report", output, lambda: comparison_page(comparison.read_runs(options.runs)))
    (run,) = options.runs
    return write_page("tools.report", options.output or run / "report.html", lambda: page(read_run(run)))


if __name__ == "__main__":
    sys.exit(main())
