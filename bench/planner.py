"""How far the planner is off: the seconds of a step that it says for a layout, beside those that the layout takes here.

    python -m bench.planner [--layout LAYOUT ...] [--only NAME ...] [--steps 14] [--seconds 60] [--json FILE]

The 8M model of recipes/tiny.yaml on rows of 512 tokens, of which half hold a stretch of a play and half are packed from short
speeches. A LAYOUT is written as for `python -m bench.equivalence`. Each is a launch of its own, in which steps and rounds of the
calibration take turns, so that a busy machine slows both alike. What is said is the mean of those steps by the documents of their
rows, what was measured their median. The first three, which set things up, count for neither. Of all layouts on so many ranks
the one that the planner would take is compared with the fastest. A layout that fails is named at the end and loses no other.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.balance import prepare
from bench.ranks import run_ranks
from console.command import CommandParser, run_command
from console.progress import say
from storage.atomic import write_atomically
from tools.layouts.comparison import DEFAULT_OVERRIDES, DEFAULT_RECIPE
from tools.layouts.layout import Layout, parse_layout

ROW_TOKENS = 512
OVERRIDES = DEFAULT_OVERRIDES | {
    "training.global_batch_tokens": "4096",
    "training.hang_seconds": "null",
    "validation.every_steps": "null",
}
WARM_UP = 3
"""Steps."""
STEPS_A_ROUND = 2
TENSOR, SEQUENCE = "tensor_parallel.autotp_size=2", "sequence_parallel_size=2"
LAYOUTS = (
    "ZeRO-0=ds_configs/zero0_fp32.json:2",
    "ZeRO-1=ds_configs/zero1_fp32.json:2",
    "ZeRO-2=ds_configs/zero2_fp32.json:2",
    "ZeRO-3=ds_configs/zero3_fp32.json:2",
    "ZeRO-2 offload=ds_configs/zero2_fp32.json:2 zero_optimization.offload_optimizer.device=cpu",
    "ZeRO-1, 2 rows at a time=ds_configs/zero1_fp32.json:2 --training.micro_batch_samples 2",
    "ZeRO-2, recomputed=ds_configs/zero2_fp32.json:2 --training.activation_checkpointing true",
    "ZeRO-2 in bf16=ds_configs/zero2.json:2",
    "pipeline 2=ds_configs/pipeline_fp32.json:2",
    "pipeline 2, recomputed=ds_configs/pipeline_fp32.json:2 --training.activation_checkpointing true",
    "tensor 2, ZeRO-0=ds_configs/tensor2_zero0_fp32.json:2",
    f"tensor 2, rows split=ds_configs/zero1_fp32.json:2 {TENSOR} tensor_parallel.split_rows=true",
    f"sequence 2, ZeRO-1=ds_configs/zero1_fp32.json:2 {SEQUENCE}",
    "one process=ds_configs/zero0_fp32.json:1",
    "pipeline 2 x data 2=ds_configs/pipeline_fp32.json:4:2",
    f"tensor 2 x data 2=ds_configs/zero1_fp32.json:4 {TENSOR}",
)


def rank(folder: Path, steps: int) -> None:
    """What one rank does; the first writes what was said and measured."""
    from launch.topology import read_topology

    topology = read_topology()

    from engine.process_group import start_process_group
    from engine.run.begin import begin
    from engine.run.plan import make_plan
    from launch.rank import leave
    from planner.calibration import Probes
    from planner.lengths import StepRows, rows_of_steps
    from planner.speed import step_time

    job = json.loads((folder / "job.json").read_text())
    degrees = {"pipeline": job["stages"]}
    plan = make_plan(DEFAULT_RECIPE, job["overrides"], job["ds_config"], job["data"], topology, degrees)
    start_process_group(topology)
    zero_stage = plan.ds_config.get("zero_optimization", {}).get("stage", 0)
    probes = Probes(plan, topology.device, (zero_stage,))
    loop, taken, began = begin(plan), list[float](), time.monotonic()
    for step in range(steps):
        before = time.perf_counter()
        loop.step()
        taken.append(time.perf_counter() - before)
        if step % STEPS_A_ROUND == 0:
            probes.round()
        if step >= 2 * WARM_UP and not probes.all_agree(time.monotonic() - began < job["seconds"]):
            break
    rates, rows = probes.rates(), rows_of_steps(plan, plan.stages[0])
    of_steps = StepRows(*(each[WARM_UP : len(taken)] for each in rows))
    measured = loop.engine.sum_over_ranks([statistics.median(taken[WARM_UP:])])[0] / topology.world_size
    if topology.is_first:
        said = step_time(plan, rates, of_steps)
        found = {"said": said.seconds, "measured": measured, "steps": len(taken), "parts": said.parts, "taken": taken}
        (folder / "results.json").write_text(json.dumps(found | {"rates": rates.model_dump()}))
    leave(0)


def measure(layout: Layout, data: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        job: dict[str, Any] = {
            "overrides": OVERRIDES | layout.overrides,
            "ds_config": layout.write_config(folder),
            "data": str(data),
        }
        job |= {"stages": layout.stages, "seconds": arguments.seconds}
        (folder / "job.json").write_text(json.dumps(job))
        found: dict[str, Any] = run_ranks("bench.planner", layout.ranks, folder, arguments.steps)
    return {"layout": layout.name, "ranks": layout.ranks, "error": found["said"] / found["measured"] - 1, **found}


def line(found: dict[str, Any]) -> str:
    parts = sorted(found["parts"].items(), key=lambda part: -part[1])
    largest = ", ".join(f"{name} {seconds / found['said']:.0%}" for name, seconds in parts[:4])
    figures = f"{found['said']:.3f} | {found['measured']:.3f} | {found['error']:+.1%}"
    return f"| {found['layout']} | {found['ranks']} | {figures} | {largest} |"


def report(results: list[dict[str, Any]]) -> None:
    print("| layout | ranks | said, s a step | measured | error | of which |\n|---|---|---|---|---|---|")
    for found in results:
        print(line(found))
    errors = sorted(abs(found["error"]) for found in results)
    within = sum(error <= 0.1 for error in errors)
    print(
        f"\n{within} of {len(errors)} layouts within 10 %, median {statistics.median(errors):.1%}, worst {errors[-1]:.1%}"
    )
    for ranks in sorted({found["ranks"] for found in results}):
        of_ranks = [found for found in results if found["ranks"] == ranks]
        chosen, best = (min(of_ranks, key=lambda found: found[key]) for key in ("said", "measured"))
        if len(of_ranks) > 1:
            more = chosen["measured"] / best["measured"] - 1
            print(
                f"on {ranks} ranks the planner takes {chosen['layout']}, {more:.1%} above the fastest, {best['layout']}"
            )


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--layout", action="append", help="a layout, any number of times (default: 16)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of these layouts those whose names begin so")
    parser.add_argument("--steps", type=int, default=14, help="of each layout (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="begin no step of it after (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="packed before by this command (default: packed anew)")
    parser.add_argument("--json", type=Path, help="also write all figures; layouts that are in it are not run again")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        rank(arguments.rank_of, arguments.steps)
    layouts = [parse_layout(text) for text in arguments.layout or LAYOUTS]
    if arguments.only:
        layouts = [layout for layout in layouts if layout.name.startswith(tuple(arguments.only))]
    results: list[dict[str, Any]] = []
    failed: list[str] = []
    if arguments.json and arguments.json.exists():
        results = json.loads(arguments.json.read_text())
    with tempfile.TemporaryDirectory() as place:
        data = arguments.data or Path(place) / "data"
        if not data.exists():
            prepare(data.parent, ROW_TOKENS)
        for layout in layouts:
            if layout.name in [found["layout"] for found in results]:
                continue
            try:
                results.append(measure(layout, data, arguments))
            except subprocess.CalledProcessError as error:
                failed.append(f"{layout.name} ended with exit code {error.returncode}")
                continue
            say(line(results[-1]))
            if arguments.json:
                write_atomically(arguments.json, json.dumps(results).encode())
    if results:
        report(results)
    if failed:
        raise ValueError("; ".join(failed))


if __name__ == "__main__":
    run_command(main)
