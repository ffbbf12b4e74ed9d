"""Which of the DeepSpeed JSONs, with which degrees, micro-batch and recomputed blocks, a run may take on some hardware.

Every legal one is asked what its ranks would hold and, where rates are known, how long a step takes. Blocks are recomputed
only as far as the rest does not fit.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from engine.ds_json.legality import illegal_combinations
from engine.ds_json.read import Resolved, StepDivision, read_ds_config, resolve_ds_config
from engine.layout.mesh import PLACES
from engine.layout.pipeline import pipeline_bounds, untrained_stages
from engine.layout.sequence import sequence_problems
from engine.run.plan import RunPlan
from engine.run.stages import plan_stages
from planner.activations import Trials
from planner.hardware import Hardware
from planner.memory import RankMemory, fullest, largest, states_of

SHARE_FOR_LIBRARIES = 0.06
"""Of a device's memory: what CUDA, NCCL and the allocator's gaps take. Stated with every plan."""
ROWS = tuple(2**n for n in range(7))
"""Of a micro-batch: more fill no device better."""


class Prospect(NamedTuple):
    """A way to run it that fits."""

    file: Path
    plan: RunPlan
    degrees: dict[str, int]
    """Of the axes that the JSON leaves open."""
    recomputed: int
    """Blocks."""
    memory: RankMemory
    step_seconds: float | None

    @property
    def rows(self) -> int:
        return self.plan.batch.micro_batch_samples


class NotFitting(NamedTuple):
    file: Path
    degrees: dict[str, int]
    reason: str


class Search(NamedTuple):
    prospects: list[Prospect]
    """The best first."""
    left_out: list[NotFitting]


StepSeconds = Callable[[RunPlan], float | None]
"""Seconds of a step."""


def search(
    plan: RunPlan, files: Sequence[Path], hardware: Hardware, degrees: dict[str, int | None], step_seconds: StepSeconds
) -> Search:
    """`plan`: of the run with any JSON; `degrees`: those that are wanted, of axes that a JSON leaves open."""
    found, trials = Search([], []), Trials()
    for file in files:
        raw = read_ds_config(file)
        for chosen in open_degrees(raw, plan, hardware, degrees):
            fitting, reason = _fitting(plan, file, raw, chosen, hardware, trials)
            timed = [one._replace(step_seconds=step_seconds(one.plan)) for one in fitting]
            if timed:
                found.prospects.append(max(timed, key=_worth))
            else:
                found.left_out.append(NotFitting(file, chosen, reason))
    found.prospects.sort(key=_worth, reverse=True)
    return found


def _fitting(
    plan: RunPlan, file: Path, raw: dict[str, Any], degrees: dict[str, int], hardware: Hardware, trials: Trials
) -> tuple[list[Prospect], str]:
    """With more and more rows, as long as they fit; and why there are none."""
    found: list[Prospect] = []
    try:
        for other in divisions(plan, file, raw, degrees, hardware, trials):
            fits, reason = least_recomputed(other, hardware, trials)
            if fits is None:
                return found, reason
            found.append(Prospect(file, with_recomputed(other, fits[0]), degrees, *fits, None))
    except ValueError as error:
        return found, _first_sentence(error, file)
    return found, "no micro-batch divides the step" if not found else ""


def _worth(one: Prospect) -> tuple[float, ...]:
    """Tokens a second; before rates are known fewer recomputed blocks, ranks that compute the same and less memory."""
    if one.step_seconds is not None:
        return (1 / one.step_seconds,)
    mesh = one.plan.mesh
    return -one.recomputed, -(mesh.tensor * mesh.sequence * mesh.pipeline), one.rows, -one.memory.peak


def open_degrees(
    raw: dict[str, Any], plan: RunPlan, hardware: Hardware, wanted: dict[str, int | None]
) -> Iterator[dict[str, int]]:
    """Degrees for the axes that a JSON leaves to the launch: powers of 2, matrices divided inside a node only."""
    model, ranks = plan.recipe.model, hardware.devices
    most = {
        "pipeline": min(model.num_hidden_layers, ranks),
        "tensor": min(hardware.devices_per_node, ranks),
        "sequence": min(hardware.devices_per_node, ranks),
    }
    choices = {}
    for axis, place in PLACES.items():
        section, _, key = place.rpartition(".")
        holder = raw.get(section, {}) if section else raw
        if holder.get(key) != "auto" and not (axis == "pipeline" and section in raw and key not in holder):
            continue
        given = wanted.get(axis)
        choices[axis] = [given] if given else [2**n for n in range(1, most[axis].bit_length()) if 2**n <= most[axis]]
    for sizes in product(*choices.values()):
        yield dict(zip(choices, sizes, strict=True))


def divisions(
    plan: RunPlan, file: Path, raw: dict[str, Any], degrees: dict[str, int], hardware: Hardware, trials: Trials
) -> Iterator[RunPlan]:
    """The plan with another JSON, and micro-batches of 1, 2, 4 ... rows where nobody says how many.

    Raises ValueError where it is not legal on this hardware.
    """
    recipe, topology = plan.recipe, hardware.topology()
    lengths = [stage.seq_length for stage in plan.stages]
    resolved = _resolved(plan, file, raw, degrees, hardware)
    if problems := [p for length in lengths for p in sequence_problems(recipe.model, resolved.mesh, length)]:
        raise ValueError(f"{file}: {problems[0]}")
    bounds: list[int] = []
    if section := resolved.config.get("pipeline"):
        cut_at = section["stages"], section["partition"], lengths[0], recipe.objective.copies
        bounds = trials.remembered(("bounds", *cut_at), lambda: pipeline_bounds(recipe.model, *cut_at))
        if untrained_stages(recipe.model, bounds):
            raise ValueError(f"{file}: a rank of the pipeline would have no adapters to train")
    samples, data = resolved.batch.samples, resolved.mesh.data
    numbers = ROWS if _is_free(raw, recipe) else (resolved.batch.micro_batch_samples,)
    for rows in numbers:
        if rows > samples // data or samples % (rows * data):
            break
        batch = StepDivision(samples, rows, samples // (rows * data))
        config = resolved.config | {
            "train_micro_batch_size_per_gpu": rows,
            "gradient_accumulation_steps": batch.accumulation,
        }
        if illegal_combinations(config, batch.accumulation, resolved.mesh, recipe, topology.device):
            continue
        folders = [stage.data for stage in plan.stages]
        stages, problems = plan_stages(
            recipe, folders, [s.dataset for s in plan.stages], resolved._replace(config=config, batch=batch)
        )
        if problems:
            raise ValueError(f"{file}: {problems[0]}")
        yield plan._replace(
            ds_config=config, mesh=resolved.mesh, stages=stages, pipeline_bounds=bounds, warnings=resolved.notices
        )


def _resolved(plan: RunPlan, file: Path, raw: dict[str, Any], degrees: dict[str, int], hardware: Hardware) -> Resolved:
    """The JSON on this hardware, with the fewest rows that are legal. Raises ValueError where none are."""
    recipe, topology, length = plan.recipe, hardware.topology(), plan.stages[0].seq_length
    first: ValueError | None = None
    for rows in ROWS if _is_free(raw, recipe) else ROWS[:1]:
        try:
            return resolve_ds_config(_with_rows(raw, recipe, rows), file, recipe, length, topology, degrees)
        except ValueError as error:
            first = first or error
    assert first is not None
    raise first


def _is_free(raw: dict[str, Any], recipe: Any) -> bool:
    said = [raw.get("train_micro_batch_size_per_gpu", "auto"), raw.get("gradient_accumulation_steps", "auto")]
    return said == ["auto", "auto"] and recipe.all_stages[0].micro_batch_samples is None


def _with_rows(raw: dict[str, Any], recipe: Any, rows: int) -> dict[str, Any]:
    return raw | {"train_micro_batch_size_per_gpu": rows} if _is_free(raw, recipe) else raw


def filled(raw: dict[str, Any], one: Prospect) -> dict[str, Any]:
    """The JSON with all that was found, to be given to `train.py`."""
    config = json.loads(json.dumps(raw)) | {"train_micro_batch_size_per_gpu": one.rows}
    for axis, size in one.degrees.items():
        section, _, key = PLACES[axis].rpartition(".")
        holder = config.setdefault(section, {}) if section else config
        holder[key] = size
    return config


def room_of(hardware: Hardware) -> int:
    """Bytes that a rank may allocate."""
    return int(hardware.device.memory * (1 - SHARE_FOR_LIBRARIES))


def least_recomputed(plan: RunPlan, hardware: Hardware, trials: Trials) -> tuple[tuple[int, RankMemory] | None, str]:
    """The fewest recomputed blocks with which it fits, and what it then holds; or None, and why not."""
    device, room = hardware.device.kind, room_of(hardware)
    states = [states_of(plan, plan.mesh._replace(rank=rank), trials) for rank in fullest(plan)]
    if (least := max(each.least for each in states)) > room:
        return None, f"weights, gradients and optimizer states alone take {gib(least)} a rank, of {gib(room)}"
    here = min(hardware.devices_per_node, hardware.devices)

    def fits(blocks: int) -> RankMemory | None:
        memory = largest(plan, device, blocks, trials)
        return memory if memory.peak <= room and memory.host * here <= hardware.host_memory else None

    low, high = 0, plan.recipe.model.num_hidden_layers
    if (memory := fits(0)) is not None:
        return (0, memory), ""
    if (best := fits(high)) is None:
        most = largest(plan, device, high, trials)
        if most.peak <= room:
            return (
                None,
                f"its node would hold {gib(most.host * here)} of offloaded states, of {gib(hardware.host_memory)}",
            )
        rows = plan.batch.micro_batch_samples
        return (
            None,
            f"{gib(most.peak)} a rank, of {gib(room)}, with {rows} row{'s' * (rows > 1)} and all blocks recomputed",
        )
    while high - low > 1:
        middle = (low + high) // 2
        if (memory := fits(middle)) is not None:
            high, best = middle, memory
        else:
            low = middle
    return (high, best), ""


def with_recomputed(plan: RunPlan, blocks: int) -> RunPlan:
    training = plan.recipe.training.model_copy(update={"activation_checkpointing": blocks})
    return plan._replace(recipe=plan.recipe.model_copy(update={"training": training}))


def _first_sentence(error: Exception, file: Path) -> str:
    lines = str(error).splitlines()
    more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
    return lines[0].removeprefix(f"{file}: ") + more


def gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
