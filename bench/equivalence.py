"""The same training steps in every layout: do they compute the same, and at what speed, memory and traffic?

    python -m bench.equivalence [--recipe R --data D] [--layout LAYOUT ...] [--steps 10] [--section.key VALUE ...]

A LAYOUT is [NAME=]FILE.json:RANKS[:STAGES] [KEY=VALUE ...] [--section.key VALUE ...] in one argument: a DeepSpeed JSON, the
processes to start, the stages of a pipeline, changed keys of the JSON, changed keys of the recipe. For example

    --layout ds_configs/zero3.json:8 --layout "recomputed=ds_configs/zero2.json:8 --training.activation_checkpointing true"

Each layout is a launch of its own on this machine: the recipe's first steps from the same start, on the run's own loader,
then a checkpoint. It is compared with the reference: rows of every step, loss, gradient norm, and the final weights
parameter by parameter. Without --layout, the shipped JSONs in float32 are taken, with two and four ranks; one that cannot
hold the recipe is shown as refused. Exit codes: 0 all within tolerance; 1 one is not, or a layout that was asked for is
refused or failed; 2 bad input. Checkpoints go to the folder for temporary files (TMPDIR), one at a time, and are deleted.

Where a training spikes, it amplifies rounding errors. How much they are on a recipe, a neutral change of it shows:

    --layout "rounding=ds_configs/zero0_fp32.json:1 --model.rope_theta 10000.01"

Columns: largest relative difference of loss and gradient norm over the steps, and of a parameter after the last; whether
all steps had the reference's rows; tokens a second of the median step; peak memory of the largest process (of the GPU, if
there is one); MB that leave the busiest rank in a step, in bandwidth-optimal collectives.
"""

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.table import Table

from console.command import run_command
from console.progress import say
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
from tools.layouts.layout import LaunchFailed, Layout, Setting, StepRecord, gpus, launch, parse_layout, plan_layout
from training.records import finite

if TYPE_CHECKING:
    from engine.run.plan import RunPlan

REFERENCE = "one process=ds_configs/zero0_fp32.json:1"
OFFLOAD_OPTIMIZER = "zero_optimization.offload_optimizer.device=cpu"
OFFLOAD_ALL = f"{OFFLOAD_OPTIMIZER} zero_optimization.offload_param.device=cpu"
ON_ONE_OR_TWO = (  # {0}: ranks
    "ZeRO-0=ds_configs/zero0_fp32.json:{0}",
    "ZeRO-1=ds_configs/zero1_fp32.json:{0}",
    "ZeRO-2=ds_configs/zero2_fp32.json:{0}",
    "ZeRO-3=ds_configs/zero3_fp32.json:{0}",
    f"ZeRO-2 offload=ds_configs/zero2_fp32.json:{{0}} {OFFLOAD_OPTIMIZER}",
    f"ZeRO-3 offload=ds_configs/zero3_fp32.json:{{0}} {OFFLOAD_ALL}",
)
TENSOR, SEQUENCE = "tensor_parallel.autotp_size=2", "sequence_parallel_size=2"
KEYS = "sequence_parallel_exchange=keys"
ON_MORE = (
    "pipeline 2=ds_configs/pipeline_fp32.json:2",
    "pipeline 2 x data 2=ds_configs/pipeline_fp32.json:4:2",
    "pipeline 4=ds_configs/pipeline_fp32.json:4",
    "tensor 2, ZeRO-0=ds_configs/tensor2_zero0_fp32.json:2",
    f"tensor 2, ZeRO-2=ds_configs/zero2_fp32.json:2 {TENSOR}",
    f"tensor 2 x data 2=ds_configs/zero1_fp32.json:4 {TENSOR}",
    f"tensor 2, rows split=ds_configs/zero1_fp32.json:2 {TENSOR} tensor_parallel.split_rows=true",
    *(f"sequence 2, ZeRO-{n}=ds_configs/zero{n}_fp32.json:2 {SEQUENCE}" for n in range(4)),
    f"pipeline 2 x tensor 2=ds_configs/pipeline_fp32.json:4:2 {TENSOR}",
    f"pipeline 2 x sequence 2=ds_configs/pipeline_fp32.json:4:2 {SEQUENCE}",
    f"keys 2, ZeRO-3=ds_configs/zero3_fp32.json:2 {SEQUENCE} {KEYS}",
    f"keys 4 on 2 key/value heads=ds_configs/zero1_fp32.json:4 sequence_parallel_size=4 {KEYS}",
    f"pipeline 2 x keys 2=ds_configs/pipeline_fp32.json:4:2 {SEQUENCE} {KEYS}",
    f"keys 8 on 4 heads=ds_configs/zero1_fp32.json:8 sequence_parallel_size=8 {KEYS}",
    f"tensor 2 x sequence 2, ZeRO-1=ds_configs/zero1_fp32.json:4 {TENSOR} {SEQUENCE}",
    f"tensor 2 x sequence 2, ZeRO-3=ds_configs/zero3_fp32.json:4 {TENSOR} {SEQUENCE}",
    f"pipeline 2 x tensor 2 x data 2=ds_configs/pipeline_fp32.json:8:2 {TENSOR}",
    f"pipeline 2 x tensor 2 x sequence 2=ds_configs/pipeline_fp32.json:8:2 {TENSOR} {SEQUENCE}",
)


class Result(NamedTuple):
    layout: Layout
    verdict: str
    """same, differs, refused (by the plan) or failed (in its launch)."""
    reason: str = ""
    steps: Sequence[StepRecord] = ()
    difference: Difference | None = None
    tolerance: Tolerance | None = None
    tokens_per_second: float = 0.0
    memory_bytes: int = 0
    wire_bytes: float = 0.0


def main() -> None:
    parser = new_parser("python -m bench.equivalence", __doc__)
    parser.add_argument(
        "--layout", action="append", help="a layout to compare, any number of times (default: shipped ones)"
    )
    parser.add_argument("--reference", default=REFERENCE, help=f"the layout to compare with (default: {REFERENCE})")
    add_flags(parser)
    arguments = parser.parse_args()
    reference = parse_layout(arguments.reference, "--reference")
    layouts = [parse_layout(text) for text in arguments.layout or default_layouts()]
    names = [layout.name for layout in (reference, *layouts)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"two layouts are called {twice[0]!r}: give one of them another NAME=")
    with workspace() as work:
        setting = read_setting(arguments, work)
        results = compare_all(reference, layouts, setting, arguments, work)
    show(results, describe_setting(setting, arguments.steps))
    if arguments.json:
        write_json(Path(arguments.json), results, setting, arguments)
    accepted = {"same"} if arguments.layout else {"same", "refused"}
    if not {result.verdict for result in results} <= accepted:
        raise SystemExit(1)


def default_layouts() -> list[str]:
    """Those that this machine has devices for: GPUs, or processes on the CPU."""
    few = 1 if gpus() == 1 else 2
    return [text.format(few) for text in ON_ONE_OR_TWO] + ([] if few == 1 else [*ON_MORE])


def compare_all(
    reference: Layout, layouts: list[Layout], setting: Setting, arguments: argparse.Namespace, work: Path
) -> list[Result]:
    """The reference first. Raises ValueError when it cannot run, for then nothing can be said."""
    from tools.layouts.final_weights import Weights

    plans: dict[str, RunPlan | ValueError] = {}
    for number, layout in enumerate([reference, *layouts]):
        folder = work / str(number)
        folder.mkdir()
        try:
            plans[layout.name] = plan_layout(layout, setting, folder)
        except ValueError as error:
            plans[layout.name] = error
    if isinstance(of_reference := plans[reference.name], ValueError):
        raise of_reference
    check_steps(of_reference, arguments.steps)

    results: list[Result] = []
    weights = None
    for number, layout in enumerate([reference, *layouts]):
        plan, label, folder = plans[layout.name], f"[{number}/{len(layouts)}] {layout.name}", work / str(number)
        began = time.monotonic()
        try:
            if isinstance(plan, ValueError):
                raise plan
            with LaunchProgress(label, arguments.steps) as progress:
                steps = launch(layout, setting, folder / "run", arguments.steps, folder, progress)
            weights = weights or Weights(folder / "run", work / "weights")
            difference = compare(steps, results[0].steps if results else steps, weights.difference(folder / "run"))
            tolerance = tolerance_between(arguments, plan, of_reference)
            verdict = "same" if tolerance.allows(difference) else "differs"
            results.append(Result(layout, verdict, "", steps, difference, tolerance, *speed(steps, plan)))
        except ValueError as error:
            if not results:
                raise
            results.append(Result(layout, "failed" if isinstance(error, LaunchFailed) else "refused", str(error)))
        shutil.rmtree(folder)
        say(f"{label}: {results[-1].verdict}, {time.monotonic() - began:.0f} s")
    return results


def speed(steps: list[StepRecord], plan: "RunPlan") -> tuple[float, int, float]:
    """Tokens a second, bytes of memory and bytes on the wire; the first step, which sets things up, counts for memory only."""
    usual = steps[1:] or steps
    seconds, wire = (statistics.median(getattr(step, key) for step in usual) for key in ("seconds", "wire_bytes"))
    return plan.step_tokens / seconds, steps[-1].memory_bytes, wire


def show(results: list[Result], title: str) -> None:
    console = open_console()
    console.print(title, soft_wrap=True)
    table = Table("layout")
    for heading in ("ranks", "loss", "norm", "weights", "rows", "tokens/s", "peak MB", "sent MB"):
        table.add_column(heading, justify="right")
    table.add_column("verdict")
    for number, result in enumerate(results):
        cells = cells_of(result, is_reference=number == 0)
        table.add_row(result.layout.name, *cells, result.verdict if number else "reference")
    console.print(table)
    for tolerance in dict.fromkeys(result.tolerance for result in results if result.tolerance):
        console.print(f"tolerance: {tolerance}")
    for result in results:
        for line in result.reason.splitlines():
            console.print(f"{result.verdict}: {result.layout.name}: {line}", markup=False, soft_wrap=True)


def cells_of(result: Result, is_reference: bool) -> list[str]:
    """What stands between a layout's name and its verdict."""
    found, ranks = result.difference, str(result.layout.ranks)
    if found is None:
        return [ranks, *[""] * 7]
    near = ["", "", ""] if is_reference else [f"{x:.1e}" for x in (found.loss, found.grad_norm, found.weights)]
    speeds = [
        f"{result.tokens_per_second:,.0f}",
        f"{result.memory_bytes / 1e6:,.0f}",
        f"{result.wire_bytes / 1e6:,.1f}",
    ]
    return [ranks, *near, "same" if found.same_samples else "OTHER", *speeds]


def write_json(path: Path, results: list[Result], setting: Setting, arguments: argparse.Namespace) -> None:
    layouts = []
    for result in results:
        named = {key: getattr(result, key) for key in ("layout", "difference", "tolerance")}
        entry = result._asdict() | {key: value and value._asdict() for key, value in named.items()}
        layouts.append(entry | {"steps": [step._asdict() for step in result.steps]})
    tree = {"setting": setting._asdict(), "steps": arguments.steps, "layouts": layouts}
    write_atomically(path, json.dumps(finite(tree), indent=1).encode())


if __name__ == "__main__":
    run_command(main)
