"""What a rank does in the planner's tests: count what a step of a layout sends, and calibrate."""

from pathlib import Path

import torch

from engine.reduction.wire import WireBytes
from planner.calibration import Probes
from tests.engine.programs import Run


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
    """The rates after two rounds, beside an engine, as JSON."""
    run = Run(recipe, data, ds_config, Path(folder) / "calibrated")
    probes = Probes(run.plan, torch.device("cpu"))
    for _ in range(2):
        probes.round()
    rates = probes.rates()
    run.close()
    return rates.model_dump_json()
