"""What `tools.plan` said of a run, which is in its DeepSpeed JSON, beside what the run takes."""

import statistics
import time
from itertools import pairwise
from typing import Any

import torch

from engine.run.plan import RunPlan
from training.environment import peak_memory_bytes

COMPARED_AFTER = 20
"""Steps of this launch."""
WARM_UP = 3
"""Steps that set things up."""


class PlanCheck:
    """Compares once in a launch, for this rank."""

    def __init__(self, plan: RunPlan, device: torch.device) -> None:
        planned = plan.ds_config.get("planned", {})
        self._planned = planned if planned.get("ranks") == plan.mesh.world_size else {}
        self._device = device
        self._ends: list[float] = []
        """When each step ended."""

    def step_done(self) -> dict[str, Any]:
        """Call after every step. After `COMPARED_AFTER` of them gives the figures and a sentence, else nothing.

        A step reaches from the end of the one before it to its own; what is done between a few of them is not in the median.
        """
        if not self._planned:
            return {}
        self._ends.append(time.perf_counter())
        if len(self._ends) < COMPARED_AFTER:
            return {}
        taken = statistics.median(end - begin for begin, end in pairwise(self._ends[WARM_UP - 1 :]))
        planned, self._planned = self._planned, {}
        found: dict[str, Any] = {}
        sentences = []
        if seconds := planned.get("step_seconds"):
            found |= {"planned_step_seconds": seconds, "measured_step_seconds": round(taken, 6)}
            sentences.append(
                f"a step takes {taken:.3g} s, {_off(taken, seconds)} the {seconds:.3g} s that were planned"
            )
        memory = planned.get("rank_memory")
        if memory and self._device.type == "cuda":
            peak = peak_memory_bytes(self._device)
            found |= {"planned_rank_memory": memory, "measured_rank_memory": peak}
            sentences.append(
                f"this rank held {peak / 1e9:.3g} GB, {_off(peak, memory)} the {memory / 1e9:.3g} GB planned"
            )
        return found | ({"text": "; ".join(sentences)} if sentences else {})


def _off(measured: float, planned: float) -> str:
    share = measured / planned - 1
    return f"{abs(share):.1%} {'above' if share > 0 else 'below'}"
