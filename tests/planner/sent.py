"""What a rank does in the planner's tests: count what a step of a layout sends, calibrate, and run blocks with others."""

import json
from pathlib import Path

import torch
import torch.distributed as dist

from engine.reduction.wire import WireBytes
from engine.run.plan import make_plan
from launch.topology import read_topology
from model.documents import Documents
from model.llama import Block, layer_plan
from planner.calibration import Probes
from planner.coupled import coupled_blocks
from tests.engine.programs import Run, join_process_group


def sent_bytes(folder: str, recipe: str, data: str, layouts: dict[str, tuple[dict, dict]]) -> dict[str, float]:
    """In bandwidth-optimal collectives, of the second step, after which nothing is set up any more."""
    found = {}
    for name, (ds_config, overrides) in layouts.items():
        run = Run(recipe, data, ds_config, Path(folder) / name, overrides)
        run.steps(1)
        with WireBytes() as wire:
            run.steps(1)
        found[name] = wire.ring_total
        run.close()
    return found


def calibrated(folder: str, recipe: str, data: str, ds_config: dict) -> str:
    """The rates after two rounds, as JSON."""
    topology = read_topology()
    file = Path(folder) / f"calibrated-{topology.rank}.json"
    file.write_text(json.dumps(ds_config))
    plan = make_plan(recipe, {}, str(file), data, topology)
    join_process_group()
    probes = Probes(plan, topology.device)
    for _ in range(2):
        probes.round()
    return probes.rates().model_dump_json()


def off_whole_blocks(folder: str, recipe: str, data: str, layouts: dict[str, tuple[dict, dict]]) -> dict[str, float]:
    """How far the last two blocks, as the ranks of each layout run them, are off the same blocks on one rank."""
    topology, found = read_topology(), {}
    join_process_group()
    for name, (ds_config, overrides) in layouts.items():
        file = Path(folder) / f"coupled-{topology.rank}.json"
        file.write_text(json.dumps(ds_config))
        plan = make_plan(recipe, overrides, str(file), data, topology)
        coupled = coupled_blocks(plan, 2, topology.device, torch.float32)
        if coupled is None:
            continue
        dealt = plan.mesh.sequence > 1 or plan.mesh.split_rows
        torch.manual_seed(topology.rank if dealt else 0)
        positions = torch.arange(plan.stages[0].seq_length).remainder(24).unsqueeze(0)
        x, act = coupled.input_and_pass(positions)
        parts = [torch.empty_like(x) for _ in range(topology.world_size)]
        dist.all_gather(parts, x)
        y, documents = torch.cat(parts, 1) if dealt else x, Documents.from_position_ids(positions)
        for layer in [layer for layer in layer_plan(plan.recipe.model) if layer.cls is Block][-2:]:
            y = layer.build(0)(y, documents)
        mine = y.chunk(topology.world_size, 1)[topology.rank] if dealt else y
        found[name] = float((act() - mine).abs().max())
    return found
