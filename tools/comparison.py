"""Several runs on one page: the same curves over each other, their final figures, and what differs between them."""

import html
import json
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from tools.page import flattened, table
from tools.run_history import Run, read_run
from tools.run_plots import validation_scores


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Raises ValueError as `read_run`. Each has a name of its own: as much of its path as tells it from the others."""
    paths = [folder.resolve() for folder in folders]
    if len(set(paths)) < len(paths):
        raise ValueError("a run was given twice: give each once")
    for parts in count(1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return [read_run(path)._replace(name=name) for path, name in zip(paths, names, strict=True)]


def figure_rows(runs: Sequence[Run], tiles: Sequence[Sequence[tuple[str, str]]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table of what stands in the `tiles` of each, and its last step."""
    names = list(dict.fromkeys(name for of_run in tiles for name, _ in of_run))
    rows = []
    for run, of_run in zip(runs, tiles, strict=True):
        step = f"{run.steps[-1]['step']:,}" if run.steps else "–"
        rows.append([run.name, step, *(dict(of_run).get(name, "–") for name in names)])
    return ["run", "steps", *names], rows


def validation_rows(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: the last loss of each run on each set."""
    found = [{name: scores[-1]["loss"] for name, scores in validation_scores(run).items()} for run in runs]
    names = list(dict.fromkeys(name for of_run in found for name in of_run))
    losses = [[of_run.get(name) for name in names] for of_run in found]
    rows = [
        [run.name, *("–" if loss is None else f"{loss:.4f}" for loss in of_run)]
        for run, of_run in zip(runs, losses, strict=True)
    ]
    return ["last loss on", *names], rows if names else []


def differences(runs: Sequence[Run]) -> str:
    """Markup: what is not the same in all of the runs' `run.json`, by its sections."""
    sections = list(dict.fromkeys(name for run in runs for name in run.facts))
    shown = ""
    for section in sections:
        facts = [dict(flattened(run.facts.get(section, {}), "")) for run in runs]
        keys = list(dict.fromkeys(key for of_run in facts for key in of_run))
        rows = [[key, *(of_run.get(key, "–") for of_run in facts)] for key in keys]
        if rows := [row for row in rows if len(set(row[1:])) > 1]:
            words = table([section.replace("_", " "), *(run.name for run in runs)], rows).replace("numbers", "words")
            shown += f"<section>{words}</section>"
    return shown or "<section><p>Nothing in their run.json differs.</p></section>"


def titled(runs: Sequence[Run], parts: Sequence[str]) -> str:
    """Markup of each run under its name; without runs that have none."""
    return "".join(f"<h2>{html.escape(run.name)}</h2>{part}" for run, part in zip(runs, parts, strict=True) if part)


def folders_of(runs: Sequence[Run]) -> str:
    """JSON for an attribute: where each run is, by its name."""
    found: dict[str, Any] = {run.name: run.folder for run in runs}
    return html.escape(json.dumps(found), quote=True)
