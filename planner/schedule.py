"""How long a step takes whose ranks wait for each other: the instructions of a pipeline, played through.

A send and its receipt begin when both sides have come to them. What is computed meanwhile shares the processors: on a host
with fewer cores than ranks one that waits leaves its core to the others.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

RECEIPTS = {"RecvActivation": -1, "RecvGrad": 1}
"""From which neighbour."""
SENDS = {"SendActivation": 1, "SendGrad": -1}
END = ("ReduceTiedGrads", "ReduceGrads", "OptimizerStep")
"""After the last micro-batch, when everybody does the same."""


class Played(NamedTuple):
    """What became of each stage's time, in seconds."""

    end: float
    """When the last stage was done with its micro-batches."""
    ends: list[float]
    """When each was."""
    computed: list[float]
    """In which it computed, at the speed that it had."""
    exchanged: list[float]


def play(
    instructions: Sequence[Sequence[str]],
    work: Callable[[int, str, int], float],
    transfer: Callable[[str], float],
    processors: float | None = None,
    alone: float = 1.0,
) -> Played:
    """Forward, backward and the exchanges between them of all stages.

    Args:
        instructions: of each stage, as `engine.layout.schedule` gives them; what follows the last micro-batch is not played.
        work: processor seconds of a stage, a pass (ForwardPass, BackwardPass) and a micro-batch.
        transfer: seconds that a send takes once both sides are there.
        processors: for all stages together, one a stage at most; None: one each.
        alone: how many times as fast a stage computes while all others wait, whose caches and memory it then has.
    """
    stages = len(instructions)
    programs = [[name for name in of_stage if name not in END] for of_stage in instructions]
    place, done = [0] * stages, [dict.fromkeys(("ForwardPass", "BackwardPass"), 0) for _ in programs]
    computing: dict[int, float] = {}
    """By stage, processor seconds that are left."""
    moving: dict[tuple[int, int], float] = {}
    """By sender and receiver, seconds that are left."""
    now, ends = 0.0, [0.0] * stages
    computed, exchanged = [0.0] * stages, [0.0] * stages
    while True:
        busy = {*computing, *(stage for pair in moving for stage in pair)}
        for stage in [stage for stage in range(stages) if stage not in busy and place[stage] < len(programs[stage])]:
            if stage in {side for pair in moving for side in pair}:
                continue
            name = programs[stage][place[stage]]
            if name in done[stage]:
                computing[stage] = work(stage, name, done[stage][name])
                done[stage][name] += 1
            elif name in SENDS and _awaits(programs, place, computing, stage + SENDS[name], stage, name):
                moving[stage, stage + SENDS[name]] = transfer(name)
        if not computing and not moving:
            break
        there = processors or stages
        idle = max(0.0, there - len(computing)) / max(there - 1, 1)
        speed = min(1.0, there / max(len(computing), 1)) * (1 + (alone - 1) * min(idle, 1.0))
        step = min([left / speed for left in computing.values()] + [*moving.values()])
        now += step
        for stage in list(computing):
            computing[stage] -= step * speed
            computed[stage] += step
        for pair in list(moving):
            moving[pair] -= step
            for stage in pair:
                exchanged[stage] += step
        finished = [stage for stage, left in computing.items() if left <= 1e-12]
        for stage in finished:
            del computing[stage]
        for pair in [pair for pair, left in moving.items() if left <= 1e-12]:
            del moving[pair]
            finished += pair
        for stage in finished:
            place[stage] += 1
            ends[stage] = now
    assert all(at == len(program) for at, program in zip(place, programs, strict=True)), (
        "the stages wait for each other"
    )
    return Played(now, ends, computed, exchanged)


def _awaits(
    programs: list[list[str]], place: list[int], computing: dict[int, float], stage: int, sender: int, name: str
) -> bool:
    """Whether a stage stands at the receipt of what the sender has."""
    if stage in computing or place[stage] >= len(programs[stage]):
        return False
    waiting = programs[stage][place[stage]]
    return waiting == name.replace("Send", "Recv") and stage + RECEIPTS[waiting] == sender
