"""Says which DeepSpeed JSON to take for a run on some hardware: what fits, how long it takes, what it costs.

python -m tools.plan --recipe recipes/llama-8b.yaml --data data --hardware h100x64

Needs neither the hardware nor weights. Before the data are built, give the length of their rows instead: --seq_length 8192.
"""

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from console.command import CommandParser, no_url, run_command

if TYPE_CHECKING:
    from engine.run.plan import RunPlan
    from planner.hardware import Hardware
    from planner.search import Prospect, Search

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "ds_configs"
OVERHEAD = 1.5
"""Watts of a whole cluster for each of its devices': processors, network, cooling (assumed; --overhead says otherwise)."""


def main() -> None:
    parser = CommandParser(prog="python -m tools.plan", description=__doc__)
    parser.add_argument("--recipe", required=True, help="what is trained")
    parser.add_argument("--data", type=no_url, help="folder made by data_prep.build")
    parser.add_argument(
        "--seq_length",
        type=int,
        nargs="+",
        metavar="N",
        help="instead of --data: tokens of a row; one, or one for each stage",
    )
    parser.add_argument(
        "--document_tokens", type=int, metavar="N", help="with --seq_length: of a document (default: a row)"
    )
    parser.add_argument("--deepspeed_config", type=Path, help="ask about this JSON only (default: all of ds_configs/)")
    parser.add_argument("--hardware", required=True, help="a device and how many (h100x64), hosts.yaml, or this")
    for axis in ("pipeline", "tensor", "sequence"):
        flag = "--pipeline_stages" if axis == "pipeline" else f"--{axis}"
        parser.add_argument(
            flag, dest=axis, type=int, metavar="N", help=f"ranks of a {axis} group (default: all are tried)"
        )
    parser.add_argument("--price", type=float, metavar="P", help="money a device hour, in your currency")
    parser.add_argument(
        "--overhead", type=float, default=OVERHEAD, help="power of the cluster for each watt of its devices"
    )
    parser.add_argument("--most", type=int, default=10, metavar="N", help="ways to show")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the best JSON there, and what is planned")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if bool(arguments.data) == bool(arguments.seq_length):
        raise ValueError("give either --data, or --seq_length before the data are built")
    with contextlib.redirect_stdout(sys.stderr), read(arguments) as (plan, hardware):
        found, notes = look(plan, hardware, arguments)
        facts = describe(plan, hardware, found, arguments) | {"notes": notes}
    print(json.dumps(facts, indent=1) if arguments.json else in_words(facts, arguments.most))
    if not found.prospects:
        raise ValueError(f"nothing fits on {arguments.hardware}: take more or larger devices, or shorter rows")
    if arguments.output:
        write(found.prospects[0], arguments.output)
        print(f"the first is written to {arguments.output}", file=sys.stderr)


@contextlib.contextmanager
def read(arguments: argparse.Namespace) -> Iterator[tuple["RunPlan", "Hardware"]]:
    """The run with some JSON that is legal there, and the hardware."""
    from launch.topology import choose_accelerator

    choose_accelerator()
    from planner.hardware import find_hardware
    from planner.prepare import plan_of_data, plan_without_data

    hardware = find_hardware(arguments.hardware)
    if arguments.price:
        hardware = hardware.model_copy(update={"price": arguments.price})
    files, degrees = asked_about(arguments)
    if arguments.data:
        yield plan_of_data(arguments.recipe, arguments.data, files, hardware, degrees), hardware
        return
    folder = Path(tempfile.mkdtemp(prefix="plan-"))
    try:
        lengths, size = arguments.seq_length, arguments.document_tokens
        yield plan_without_data(arguments.recipe, folder, lengths, size, files, hardware, degrees), hardware
    finally:
        shutil.rmtree(folder)


def asked_about(arguments: argparse.Namespace) -> tuple[list[Path], dict[str, int | None]]:
    """The JSONs, and the degrees that are wanted."""
    files = [arguments.deepspeed_config] if arguments.deepspeed_config else sorted(SHIPPED.glob("*.json"))
    return files, {axis: getattr(arguments, axis) for axis in ("pipeline", "tensor", "sequence")}


def look(plan: "RunPlan", hardware: "Hardware", arguments: argparse.Namespace) -> tuple["Search", list[str]]:
    from planner.clock import Clock
    from planner.search import SHARE_FOR_LIBRARIES, search

    clock, (files, degrees) = Clock(hardware), asked_about(arguments)
    found = search(plan, files, hardware, degrees, clock.step_seconds)
    notes = [f"of a device's memory {SHARE_FOR_LIBRARIES:.0%} are left to libraries and the allocator"]
    return found, notes + clock.notes


def describe(plan: "RunPlan", hardware: "Hardware", found: "Search", arguments: argparse.Namespace) -> dict[str, Any]:
    """All that is said, JSON-able."""
    from engine.run.memory import checkpoint_bytes

    kept = plan.recipe.checkpoint.keep_last
    lengths = [stage.seq_length for stage in plan.stages]
    tokens = plan.total_steps * plan.step_tokens
    width = 2 if plan.recipe.model.vocab_size <= 2**16 else 4
    return {
        "recipe": arguments.recipe,
        "hardware": hardware.model_dump(),
        "hardware_in_words": str(hardware),
        "parameters": plan.recipe.model.num_parameters(),
        "seq_lengths": lengths,
        "steps": plan.total_steps,
        "tokens": tokens,
        "checkpoint_bytes": checkpoint_bytes(plan),
        "checkpoints_kept": kept,
        "token_bytes": tokens * width,
        "fits": [_of(one, plan, hardware, arguments.overhead) for one in found.prospects],
        "left_out": [
            {"deepspeed_config": str(each.file), "degrees": each.degrees, "reason": each.reason}
            for each in found.left_out
        ],
    }


def _of(one: "Prospect", plan: "RunPlan", hardware: "Hardware", overhead: float) -> dict[str, Any]:
    seconds = one.step_seconds
    hours = None if seconds is None else seconds * plan.total_steps / 3600
    of_devices = None if hours is None else hours * hardware.devices
    watts, price = hardware.device.watts, hardware.price
    return {
        "deepspeed_config": str(one.file),
        "degrees": one.degrees,
        "layout": str(one.plan.mesh),
        "micro_batch_samples": one.rows,
        "activation_checkpointing": one.recomputed,
        "rank_memory": one.memory._asdict() | {"peak": one.memory.peak},
        "step_seconds": seconds,
        "tokens_per_second": seconds and plan.step_tokens / seconds,
        "hours": hours,
        "device_hours": of_devices,
        "kilowatt_hours": of_devices and watts and of_devices * watts * overhead / 1000,
        "price": of_devices and price and of_devices * price,
    }


def in_words(facts: dict[str, Any], most: int) -> str:
    lengths = " and ".join(f"{n:,}" for n in dict.fromkeys(facts["seq_lengths"]))
    lines = [
        f"{facts['recipe']}: {facts['parameters'] / 1e6:,.1f}M parameters, rows of {lengths} tokens, {facts['steps']:,} steps, "
        f"{facts['tokens']:,} tokens",
        facts["hardware_in_words"],
        f"a checkpoint {_bytes(facts['checkpoint_bytes'])}, {facts['checkpoints_kept']} kept; the tokens of the run "
        f"{_bytes(facts['token_bytes'])} if none is seen twice",
    ]
    if fits := facts["fits"]:
        lines += ["", *_table(fits[:most])]
        if len(fits) > most:
            lines.append(f"... and {len(fits) - most} more (--most, --json)")
    by_reason: dict[str, list[str]] = {}
    for each in facts["left_out"]:
        by_reason.setdefault(each["reason"], []).append(_name(each))
    if by_reason:
        lines += ["", "left out:"] + [f"  {', '.join(names)}: {reason}" for reason, names in by_reason.items()]
    return "\n".join([*lines, "", *(f"note: {note}" for note in facts["notes"])])


def _name(each: dict[str, Any]) -> str:
    degrees = " ".join(f"{axis} {size}" for axis, size in each["degrees"].items())
    return f"{Path(each['deepspeed_config']).name}{f' ({degrees})' if degrees else ''}"


def _table(fits: list[dict[str, Any]]) -> list[str]:
    head = ["", "JSON", "rows", "recomputed", "a rank holds", "step", "tokens/s", "run", "device hours", "kWh", "price"]
    body = [
        [
            str(number),
            _name(each),
            str(each["micro_batch_samples"]),
            str(each["activation_checkpointing"]),
            f"{each['rank_memory']['peak'] / 2**30:,.1f} GiB",
            _figure(each["step_seconds"], "{:,.3g} s"),
            _figure(each["tokens_per_second"], "{:,.0f}"),
            _figure(each["hours"], "{:,.1f} h"),
            _figure(each["device_hours"], "{:,.0f}" if (each["device_hours"] or 0) >= 10 else "{:.2g}"),
            _figure(each["kilowatt_hours"], "{:,.0f}" if (each["kilowatt_hours"] or 0) >= 10 else "{:.2g}"),
            _figure(each["price"], "{:,.0f}" if (each["price"] or 0) >= 10 else "{:.2g}"),
        ]
        for number, each in enumerate(fits, start=1)
    ]
    used = [column for column in zip(head, *body, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in used]
    lines = []
    for row in zip(*used, strict=True):
        cells = [
            cell.rjust(n) if place > 1 else cell.ljust(n)
            for place, (cell, n) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _bytes(size: float) -> str:
    return (
        f"{size / 1e6:,.3g} MB"
        if size < 1e9
        else f"{size / 1e9:,.2f} GB"
        if size < 10e9
        else f"{size / 1e9:,.0f} GB"
        if size < 10e12
        else f"{size / 1e12:,.0f} TB"
    )


def write(one: "Prospect", output: Path) -> None:
    """The JSON with its degrees and micro-batch filled in, as a run takes it, and what the run compares itself with."""
    from engine.ds_json.read import read_ds_config
    from planner.search import filled
    from storage.atomic import write_atomically

    planned: dict[str, float] = {"ranks": one.plan.mesh.world_size, "rank_memory": one.memory.peak}
    if one.step_seconds is not None:
        planned["step_seconds"] = one.step_seconds
    config = filled(read_ds_config(one.file), one) | {"planned": planned}
    write_atomically(output, (json.dumps(config, indent=2) + "\n").encode())


if __name__ == "__main__":
    run_command(main)
