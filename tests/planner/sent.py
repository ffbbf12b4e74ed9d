"""What a rank does in the planner's tests: count what a step of a layout sends, and calibrate."""

import json
from pathlib import Path

from engine.reduction.wire import WireBytes
from engine.run.plan import make_plan
from launch.topology import read_topology
from planner.calibration import Probes
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
