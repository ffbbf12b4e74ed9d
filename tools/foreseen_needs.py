"""What a run will need of the hosts of a launch, as far as it can be told before: legality, memory, disk for checkpoints."""

import argparse
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engine.checkpoint.manifest import steps
from engine.run.memory import checkpoint_bytes, in_words, largest_need, shortage_of
from engine.run.plan import RunPlan, make_plan
from launch.topology import Topology


class Room(NamedTuple):
    """What a host has for its ranks."""

    ranks: int
    free_memory: int | None
    """Bytes of the host."""
    device_memory: int
    """Bytes of its smallest GPU; 0 without one."""


class Needs(NamedTuple):
    problems: list[str]
    facts: dict[str, Any]
    lines: list[tuple[str, str]]
    """To print, with a name each."""


def foresee(arguments: argparse.Namespace, hosts: Mapping[str, Room]) -> Needs:
    """The needs of the run that the arguments of `train.py` describe, on these hosts in their order.

    After `launch.topology.choose_accelerator`.
    """
    kind = "cuda" if all(room.device_memory for room in hosts.values()) else "cpu"
    world_size, first = sum(room.ranks for room in hosts.values()), 0
    topologies = {}
    for host, room in hosts.items():
        topologies[host] = Topology(first, 0, world_size, torch.device(kind), room.ranks)
        first += room.ranks
    run = Path(arguments.output) if arguments.output else None
    degrees = {axis: getattr(arguments, axis) for axis in ("pipeline", "tensor", "sequence")}
    first_host, fresh = next(iter(topologies.values())), not (run and steps(run))
    try:
        plan = make_plan(
            arguments.recipe, {}, arguments.deepspeed_config, arguments.data, first_host, degrees, fresh=fresh
        )
    except ValueError as error:
        return Needs(str(error).splitlines(), {}, [])
    need = largest_need(plan)
    problems = [
        f"{host}: {shortage}"
        for host, topology in topologies.items()
        if (shortage := shortage_of(plan, topology, _free(hosts[host])))
    ]
    facts: dict[str, Any] = {"ranks": world_size, "rank_memory": need._asdict()}
    lines = [("memory", f"a rank needs at least {in_words(need)}")]
    if run:
        wanted, free = disk_needed(plan, run), free_disk(run)
        facts |= {"checkpoint_bytes": checkpoint_bytes(plan), "disk_needed": wanted, "disk_free": free}
        line = f"checkpoints of {_gb(checkpoint_bytes(plan))} each need {_gb(wanted)} more in {run} and {_gb(free)} are free"
        lines.append(("disk", line))
        if wanted > free:
            problems.append(
                f"{line}: make room, choose another --output, or keep fewer (checkpoint.keep_last, keep_every_steps)"
            )
    return Needs(problems, facts, lines)


def _free(room: Room) -> dict[str, int]:
    """As `engine.run.memory.free_memory` has it; what is not known is no shortage."""
    host = room.free_memory if room.free_memory is not None else 1 << 62
    return {"host memory": host, "GPU memory": room.device_memory}


def disk_needed(plan: RunPlan, run: Path) -> int:
    """Bytes that the run's checkpoints will take beyond those that are there: all that are kept, and one being written."""
    policy, last = plan.recipe.checkpoint, plan.total_steps
    saves = -(-last // policy.every_steps)
    lasting = 0
    if policy.keep_every_steps:
        saved = [*range(policy.every_steps, last, policy.every_steps), last]
        lasting = sum(step % policy.keep_every_steps == 0 for step in saved[: -policy.keep_last])
    there = sum(file.stat().st_size for folder in steps(run) for file in folder.rglob("*") if file.is_file())
    return max(0, checkpoint_bytes(plan) * min(saves, policy.keep_last + 1 + lasting) - there)


def free_disk(folder: Path) -> int:
    """Bytes free where this folder is, or will be."""
    return shutil.disk_usage(next(each for each in (folder, *folder.absolute().parents) if each.is_dir())).free


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size < 10e9 else f"{size / 1e9:,.0f} GB"
