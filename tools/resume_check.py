"""Certify, on your recipe and data, that a run can stop in one layout and continue in another.

    python -m tools.resume_check [--recipe R --data D] --from LAYOUT --to LAYOUT [--stop-at 5] [--steps 10]

A LAYOUT is [NAME=]FILE.json:RANKS[:STAGES] [KEY=VALUE ...] [--section.key VALUE ...] in one argument, as for
bench.equivalence. Three launches: all steps in the first layout; the same stopped after --stop-at with a checkpoint; that
checkpoint continued in the second layout to the end. Certified is that every step had the rows of the uninterrupted run,
and losses, gradient norms and final weights within tolerance. Exit codes: 0 certified; 1 not; 2 bad input.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

from rich.table import Table

from console.command import run_command
from storage.atomic import write_atomically
from tools.layouts.comparison import (
    Difference,
    LaunchProgress,
    Tolerance,
    add_flags,
    check_steps,
    compare,
    describe_setting,
    new_parser,
    open_console,
    read_setting,
    tolerance_between,
    workspace,
)
from tools.layouts.layout import Layout, Setting, StepRecord, launch, parse_layout, plan_layout
from training.records import finite


class Part(NamedTuple):
    """A stretch of the run that stopped, beside the same steps of the run that did not."""

    steps: str
    layout: Layout
    difference: Difference
    tolerance: Tolerance


def main() -> None:
    parser = new_parser("python -m tools.resume_check", __doc__)
    parser.add_argument("--from", required=True, dest="source", metavar="LAYOUT", help="where the run begins and stops")
    parser.add_argument("--to", required=True, dest="target", metavar="LAYOUT", help="where it continues")
    parser.add_argument("--stop-at", type=int, default=5, help="last step before the stop (default: 5)")
    add_flags(parser)
    arguments = parser.parse_args()
    from tools.layouts.final_weights import Weights

    source, target = parse_layout(arguments.source, "--from"), parse_layout(arguments.target, "--to")
    stop, last = arguments.stop_at, arguments.steps
    if not 0 < stop < last:
        raise ValueError(f"--stop-at must be at least 1 and less than --steps, got {stop} and {last}")
    with workspace() as work:
        setting = read_setting(arguments, work)
        plans = [plan_layout(layout, setting, work) for layout in (source, target)]
        check_steps(plans[0], last)
        whole, stopped, resumed = run_all(source, target, setting, arguments, work)
        weights = Weights(work / "whole", work / "weights").difference(work / "stopped")
    before, after = compare(stopped, whole[:stop]), compare(resumed, whole[stop:], weights)
    parts = [
        Part(f"1-{stop}", source, before, tolerance_between(arguments, plans[0])),
        Part(f"{stop + 1}-{last}", target, after, tolerance_between(arguments, *plans)),
    ]
    show(parts, describe_setting(setting, last))
    certified = all(part.tolerance.allows(part.difference) for part in parts)
    if arguments.json:
        entries = [{key: value._asdict() for key, value in part._asdict().items() if key != "steps"} for part in parts]
        runs = {"whole": whole, "stopped": stopped, "resumed": resumed}
        curves = {name: [step._asdict() for step in steps] for name, steps in runs.items()}
        tree = {"setting": setting._asdict(), "certified": certified, "parts": entries, "runs": curves}
        write_atomically(Path(arguments.json), json.dumps(finite(tree), indent=1).encode())
    print("certified" if certified else "NOT certified: the continued run is not the run that never stopped")
    if not certified:
        raise SystemExit(1)


def run_all(
    source: Layout, target: Layout, setting: Setting, arguments: argparse.Namespace, work: Path
) -> list[list[StepRecord]]:
    """The steps of the uninterrupted run, of the stopped one and of its continuation."""
    stop, last = arguments.stop_at, arguments.steps
    launches = [  # what it is, where it runs, folder, first and last step
        ("uninterrupted", source, "whole", 1, last),
        ("stopped", source, "stopped", 1, stop),
        ("continued", target, "stopped", stop + 1, last),
    ]
    results = []
    for number, (words, layout, run, begin, end) in enumerate(launches, start=1):
        with LaunchProgress(f"[{number}/3] {words}, {layout.name}", end - begin + 1) as progress:
            results.append(launch(layout, setting, work / run, end, work / f"launch-{number}", progress))
    return results


def show(parts: list[Part], title: str) -> None:
    console = open_console()
    console.print(title, soft_wrap=True)
    table = Table("steps", "layout", "rows")
    for heading in ("loss", "norm", "weights"):
        table.add_column(heading, justify="right")
    table.add_column("tolerance")
    for part in parts:
        near = (part.difference.loss, part.difference.grad_norm, part.difference.weights)
        numbers = [f"{value:.1e}" if value is not None else "" for value in near]
        rows = "same" if part.difference.same_samples else "OTHER"
        table.add_row(part.steps, part.layout.name, rows, *numbers, str(part.tolerance))
    console.print(table)


if __name__ == "__main__":
    run_command(main)
