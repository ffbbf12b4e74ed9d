"""What a run must hold in memory, by arithmetic over the layer plan and the filled JSON, before anything is built.

Weights, gradients and optimizer states are cut as ZeRO (Rajbhandari et al. 2020, sections 3 and 5), the pipeline and the
tensor-parallel ranks cut them; of activations, buffers and libraries only what is certain to be there is counted. So every
figure is a lower bound: what does not fit by it does not fit.
"""

from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engine.ds_json.read import read_ds_config, resolve_ds_config
from engine.layout.mesh import Mesh
from engine.layout.pipeline import pipeline_bounds
from engine.layout.sequence import sequence_problems
from engine.layout.slices import cuts_of_layer, slice_of
from engine.run.plan import RunPlan
from launch.topology import Topology
from model.adapter_config import AdaptersConfig
from model.config import ModelConfig
from model.llama import Block, Layer, layer_plan
from training.environment import free_memory_bytes

SHIPPED = Path(__file__).resolve().parents[2] / "ds_configs"
MOST_HOSTS = 1024


class Need(NamedTuple):
    """Bytes that one rank cannot do without."""

    weights: int
    gradients: int
    optimizer: int
    """Moments and, where they are kept, the float32 copies of the weights."""
    activations: int
    """Of the residual stream alone, one tensor a block and micro-batch under way, where it outlasts the gradients."""
    offloaded: int
    """Of the above, what lies in the host's memory although the rank has a device of its own."""
    building: int
    """Of the host, while the model is built; the rest comes after it."""
    snapshot: int
    """Of the host, what a save in the background copies; 0 where saves are made at once."""

    @property
    def training(self) -> int:
        """On device and host together."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def of_host(self, device: torch.device) -> int:
        return max(self.building, (self.training if device.type == "cpu" else self.offloaded) + self.snapshot)

    def of_device(self) -> int:
        return self.training - self.offloaded


def share(whole: int, parts: int, number: int) -> int:
    """The size of one of so many parts of a whole, which differ by 1 at most."""
    return whole * (number + 1) // parts - whole * number // parts


class Size(NamedTuple):
    """Of a parameter."""

    numel: int
    trained: bool


def parameter_sizes(model: ModelConfig, bounds: list[int], mesh: Mesh) -> list[Size]:
    """Elements of every parameter that this rank's layers and tensor-parallel part hold, in the order of the layer plan.

    `bounds`: of the pipeline's stages (see `engine.layout.pipeline`), or empty. A pipeline has a tied weight on both ends.
    """
    plan = layer_plan(model)
    first, last = bounds[mesh.pipeline_rank : mesh.pipeline_rank + 2] if bounds else (0, len(plan))
    of_kind: dict[Any, list[Size]] = {}
    with torch.device("meta"):
        for entry in plan:
            if kind_of_layer(entry) not in of_kind:
                layer = entry.build(seed=0)
                dimensions = cuts_of_layer(layer)
                of_kind[kind_of_layer(entry)] = [
                    Size(slice_of(p, dimensions.get(name), mesh.tensor_rank, mesh.tensor).numel(), p.requires_grad)
                    for name, p in layer.named_parameters()
                ]
    held = [kind_of_layer(entry) for entry in plan[first:last]]
    held += [entry.tied_to for entry in plan[first:last] if entry.tied_to and entry.tied_to not in held]
    return [size for kind in held for size in of_kind[kind]]


def kind_of_layer(entry: Layer) -> Any:
    """What layers of the same parameters have in common."""
    return (Block, entry.adapters is None) if entry.cls is Block else entry.name


def rank_need(plan: RunPlan, rank: int) -> Need:
    """What the rank with this number has to hold."""
    config, mesh, recipe = plan.ds_config, plan.mesh._replace(rank=rank), plan.recipe
    zero, bf16 = config.get("zero_optimization", {}), config.get("bf16", {})
    stage, half = zero.get("stage", 0), has_half_weights(plan)
    sizes = parameter_sizes(recipe.model, plan.pipeline_bounds, mesh)
    among, number = mesh.data * mesh.sequence, mesh.data_rank * mesh.sequence + mesh.sequence_rank
    everything, parameters = (sum(size.numel for size in sizes if size.trained or frozen) for frozen in (True, False))
    part = share(parameters, among, number)

    width, master_width, state_width = widths(plan)
    sum_width = {"fp32": 4, None: width}.get(config.get("data_types", {}).get("grad_accum_dtype"), 2)
    to_host = {key: _share_on(zero, key, "cpu") for key in ("offload_optimizer", "offload_param")}
    kept = {key: 1.0 - _share_on(zero, key, "nvme") for key in to_host}

    of_weights = share(everything, among, number) * kept["offload_param"] if stage == 3 else everything
    weights = int(width * of_weights)
    optimizer = (
        int((master_width + state_width) * part * kept["offload_optimizer"]) if stage else state_width * parameters
    )
    gradients = sum_width * part * kept["offload_optimizer"]
    if stage == 0:
        gradients = width * parameters
    elif stage == 1 and half and sum_width > width and not zero.get("offload_optimizer"):
        # DeepSpeed's bf16 optimizer: whole sums in float32 beside the gradients themselves
        gradients = (sum_width + width * (not bf16.get("immediate_grad_update"))) * parameters
    gradients = int(gradients)
    offloaded = to_host["offload_optimizer"] * (optimizer + gradients) + to_host["offload_param"] * weights

    rows = max(each.batch.micro_batch_samples * each.seq_length for each in plan.stages) * recipe.objective.copies
    under_way = min(mesh.pipeline - mesh.pipeline_rank, plan.batch.accumulation)
    blocks = _blocks(recipe.model, plan.pipeline_bounds, mesh.pipeline_rank)
    tokens = rows // mesh.sequence // (mesh.tensor if mesh.split_rows else 1)
    activations = width * tokens * recipe.model.hidden_size * blocks * under_way
    if plan.batch.accumulation == 1:  # gradients come as activations go
        activations = max(0, activations - gradients)
    if stage:
        snapshot = optimizer
    else:  # the first of those that hold the same
        snapshot = 0 if number else (width + state_width) * parameters
    snapshot *= recipe.checkpoint.background
    return Need(weights, gradients, optimizer, activations, int(offloaded), _building(plan, mesh, stage), snapshot)


class Widths(NamedTuple):
    """Bytes of a trained parameter."""

    weight: int
    master: int
    """Of the copy by which the optimizer goes."""
    moments: int
    """At least: under Muon some parameters have two."""


def widths(plan: RunPlan) -> Widths:
    bf16, moments = plan.ds_config.get("bf16", {}), 2 if plan.recipe.optimizer.name in ("adamw", "normuon") else 1
    return Widths(
        weight=2 if has_half_weights(plan) else 4,
        master=2 if bf16.get("bf16_master_weights_and_grads") else 4,
        moments=moments * (2 if bf16.get("bf16_optimizer_states") else 4),
    )


def has_half_weights(plan: RunPlan) -> bool:
    """Whether the weights are; under torch_autocast they are not."""
    return any(plan.ds_config.get(key, {}).get("enabled") for key in ("bf16", "fp16"))


def checkpoint_bytes(plan: RunPlan) -> int:
    """What a checkpoint takes on disk, at least: the weights as the optimizer has them, and moments."""
    width = widths(plan)
    return plan.recipe.model.num_trained_parameters() * (width.master + width.moments)


def largest_need(plan: RunPlan) -> Need:
    """That of the rank with most to hold: the stages of a pipeline differ, other layouts cut evenly."""
    firsts = range(0, plan.mesh.world_size, plan.mesh.world_size // plan.mesh.pipeline)
    return max((rank_need(plan, rank) for rank in firsts), key=lambda need: need.training)


def _share_on(zero: dict[str, Any], section: str, device: str) -> float:
    """How much of the optimizer's states or of the weights an `offload_*` section puts there."""
    offload = zero.get(section) or {}
    return float(offload.get("ratio", 1.0)) if offload.get("device") == device else 0.0


def _blocks(model: ModelConfig, bounds: list[int], stage: int) -> int:
    plan = layer_plan(model)
    first, last = bounds[stage : stage + 2] if bounds else (0, len(plan))
    return sum(entry.cls is Block for entry in plan[first:last])


def _building(plan: RunPlan, mesh: Mesh, stage: int) -> int:
    """The most that the host holds while layers are made one by one in float32, each parameter drawn whole beside its own.

    What tensor parallelism leaves of a layer stays until DeepSpeed gets the model; at stage 3 nothing does.
    """
    meshes = mesh, mesh._replace(tensor=1)
    kept, whole = (
        [size.numel for size in parameter_sizes(plan.recipe.model, plan.pipeline_bounds, each)] for each in meshes
    )
    if stage == 3:
        return 4 * 2 * max(whole)
    return 4 * max(done - part + 2 * size for done, part, size in zip(accumulate(kept), kept, whole, strict=True))


def check_memory(plan: RunPlan, topology: Topology, overcommit: bool = False) -> str:
    """A line about what a rank needs and this host has, and where there are adapters one about what they cost.

    Raises ValueError when it cannot fit, naming the nearest shipped JSON and the number of hosts with which it may; not if
    `overcommit`, for which the line says so.
    """
    need, free = largest_need(plan), free_memory(topology.device)
    shortage = shortage_of(plan, topology, free)
    if shortage and not overcommit:
        raise ValueError(f"{shortage}: {remedy(plan, topology, free)}, or go on with --allow_overcommit")
    peak = f"{in_words(need)}, and {_gib(need.building)} of the host while the model is built"
    peak += f" and {_gib(need.snapshot)} of it for saves in the background" * bool(need.snapshot)
    rooms = " and ".join(f"{_gib(room)} of {place}" for place, room in free.items())
    ranks = len(_ranks_here(topology))
    trained = plan.recipe.model.num_trained_parameters()
    of_these = f", of which {trained / 1e6:,.2f}M are trained" if plan.recipe.adapters.freeze_base else ""
    return (
        f"memory: {plan.recipe.model.num_parameters() / 1e6:,.1f}M parameters{of_these}; a rank needs at least {peak}; "
        f"{rooms} are free here"
        + f", for {ranks} ranks" * (ranks > 1)
        + f"; going on although {shortage}" * bool(shortage)
        + _arithmetic_of_adapters(plan)
    )


def in_words(need: Need) -> str:
    parts = [f"{name} {_gib(getattr(need, name))}" for name in ("weights", "gradients", "optimizer", "activations")]
    return f"{_gib(need.training)} ({', '.join(parts)})"


def _arithmetic_of_adapters(plan: RunPlan) -> str:
    adapters, context = plan.recipe.adapters, plan.stages[0].mean_document_tokens
    if not adapters.names:
        return ""
    plain = plan.recipe.model.model_copy(update={"adapters": AdaptersConfig()}).flops_per_token(context)
    cost, number = plan.recipe.model.flops_per_token(context), len(adapters.names)
    return (
        f"\narithmetic: {number} adapter{'s' if number > 1 else ''} in mode {adapters.mode} take {cost / 1e6:,.2f} MFLOP a "
        f"token, {cost / plain:.2f} times what training the model without them would"
    )


def remedy(plan: RunPlan, topology: Topology, free: dict[str, int]) -> str:
    """What to change so that the run may fit: the nearest shipped JSON, alike in ranks and precision if possible."""
    fitting = []
    for file in sorted(SHIPPED.glob("*.json")):
        other = _with_config(plan, file, topology)
        if other is not None and not shortage_of(other, topology, free):
            changes = len(_leaves(other.ds_config) ^ _leaves(plan.ds_config))
            fitting.append((other.mesh != plan.mesh, other.half_precision != plan.half_precision, changes, file.name))
    helps = plan.recipe.checkpoint.background and not shortage_of(_saving_at_once(plan), topology, free)
    words = ["set checkpoint.background to false"] if helps else []
    words += [f"take ds_configs/{min(fitting)[-1]}"] if fitting else []
    hosts, ranks = -(-topology.world_size // topology.local_size), topology.local_size
    while (hosts := hosts * 2) <= MOST_HOSTS:
        wider = plan._replace(mesh=plan.mesh._replace(world_size=hosts * ranks))
        if plan.batch.samples % wider.mesh.data:
            continue
        # the ends of a pipeline hold most, and all other layouts share evenly
        ends = [
            replace(topology, rank=first, local_rank=0, world_size=hosts * ranks) for first in (0, (hosts - 1) * ranks)
        ]
        if not any(shortage_of(wider, end, free) for end in ends):
            words.append(f"start {hosts} hosts like this one with {ranks} rank{'s' if ranks > 1 else ''} each")
            break
    return ", or ".join(words or ["take a smaller model: no shipped DeepSpeed config fits, on any number of hosts"])


def _saving_at_once(plan: RunPlan) -> RunPlan:
    checkpoint = plan.recipe.checkpoint.model_copy(update={"background": False})
    return plan._replace(recipe=plan.recipe.model_copy(update={"checkpoint": checkpoint}))


def _with_config(plan: RunPlan, file: Path, topology: Topology) -> RunPlan | None:
    """The plan with another JSON; None where it is not legal on this launch."""
    recipe, lengths = plan.recipe, [stage.seq_length for stage in plan.stages]
    try:
        resolved = resolve_ds_config(read_ds_config(file), file, recipe, lengths[0], topology)
        if any(sequence_problems(recipe.model, resolved.mesh, length) for length in lengths):
            return None
        section = resolved.config.get("pipeline")
        cut_at = (section["stages"], section["partition"], lengths[0], recipe.objective.copies) if section else None
        bounds = pipeline_bounds(recipe.model, *cut_at) if cut_at else []
    except ValueError:
        return None
    return plan._replace(ds_config=resolved.config, mesh=resolved.mesh, pipeline_bounds=bounds)


def free_memory(device: torch.device) -> dict[str, int]:
    """Bytes that can still be taken, by the words for the place."""
    free = {"host memory": free_memory_bytes(torch.device("cpu"))}
    return free | ({"GPU memory": free_memory_bytes(device)} if device.type == "cuda" else {})


def _ranks_here(topology: Topology) -> range:
    first = topology.rank - topology.local_rank
    return range(first, min(first + topology.local_size, topology.world_size))


def shortage_of(plan: RunPlan, topology: Topology, free: dict[str, int]) -> str:
    """A clause about what cannot fit; empty if all may."""
    here, device = _ranks_here(topology), topology.device
    needs = {rank: rank_need(plan, rank) for rank in here}
    host = sum(need.of_host(device) for need in needs.values())
    who = f"the {len(here)} ranks of this host need" if len(here) > 1 else "this rank needs"
    if host > free["host memory"]:
        copies = sum(need.snapshot for need in needs.values())
        of_it = f", {_gib(copies)} of it for what saves in the background copy," * bool(copies)
        return f"{who} at least {_gib(host)} of host memory{of_it} and {_gib(free['host memory'])} are free"
    own = needs[topology.rank].of_device()
    if device.type == "cuda" and own > free["GPU memory"]:
        return f"this rank needs at least {_gib(own)} of GPU memory and {_gib(free['GPU memory'])} are free"
    return ""


def _leaves(tree: Any, place: str = "") -> set[tuple[str, str]]:
    if not isinstance(tree, dict):
        return {(place, str(tree))}
    return {leaf for key, value in tree.items() for leaf in _leaves(value, f"{place}.{key}")}


def _gib(size: int) -> str:
    return f"{size / 2**30:,.2f} GiB" if size < 10 * 2**30 else f"{size / 2**30:,.0f} GiB"
