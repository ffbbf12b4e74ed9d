"""What a rank allocates at most during a step, in any layout: states by arithmetic, activations on fake tensors, both in time.

States (weights, gradients, what the optimizer keeps) follow from what this rank holds and from what DeepSpeed's optimizers
make of it, as `engine.run.memory` says and below. What layers hold is measured on fake tensors (`planner.activations`). A
step is then walked through: forward and backward over the layers, micro-batch after micro-batch, with as many of them under
way as the schedule of a pipeline has (Narayanan et al. 2021, section 2.2), then the reduction and the update.

Not counted: what Python, torch and the libraries hold before the engine is built, what an allocator keeps beside what it
was asked for, blocks that are compiled (they hold less), saves in the background.
"""

from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch

from engine.attention_kernel import attends_by_products
from engine.layout.mesh import Mesh
from engine.layout.pipeline import recomputed_blocks
from engine.run.memory import kind_of_layer, parameter_sizes, share, widths
from engine.run.plan import RunPlan
from model.llama import Block, is_recomputed, layer_plan
from planner.activations import LayerBytes, Layers, Numbers, RowsHere, Trials

FLAT_BUCKET = 500_000_000
"""Elements that DeepSpeed's engine puts into one all-reduce where no ZeRO optimizer does it."""
DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "stage3_param_persistence_threshold": 100_000,
    "sub_group_size": 1_000_000_000,
}


class RankMemory(NamedTuple):
    """Bytes of a rank when it holds most. All but `host` are where the model is: on the GPU if it has one."""

    weights: int
    """At stage 3 with what is gathered at that moment."""
    gradients: int
    optimizer: int
    """Masters and moments."""
    buffers: int
    """Of DeepSpeed: buckets, copies that are reduced, what travels in a pipeline."""
    activations: int
    host: int
    """Of states that are offloaded, beside the others."""
    phase: str
    """forward, backward or update: when this is."""

    @property
    def peak(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.buffers + self.activations


class States(NamedTuple):
    """Bytes that a rank holds throughout, and how it treats gradients."""

    weights: int
    optimizer: int
    gradients: int
    buffers: int
    stay: bool
    """Whether gradients of parameters stay from backward to the update."""
    reduction: int
    """What a reduction at the end of a step takes beside, for a moment."""
    update: int
    """Likewise the update."""
    host: int
    fills: tuple[int, ...] = ()
    """Buckets that gradients fill while a backward pass goes on: a CPU gives their memory as they do, a GPU when it begins."""

    @property
    def least(self) -> int:
        """That a rank cannot do without, whatever it works on."""
        return self.weights + self.optimizer + self.gradients


def numbers_of(plan: RunPlan, device: str) -> Numbers:
    enabled = {key: plan.ds_config.get(key, {}).get("enabled") for key in ("bf16", "fp16", "torch_autocast")}
    weights = torch.bfloat16 if enabled["bf16"] else torch.float16 if enabled["fp16"] else torch.float32
    named = plan.ds_config.get("torch_autocast", {}).get("dtype") or "bfloat16"
    autocast = getattr(torch, named) if enabled["torch_autocast"] else None
    return Numbers(weights, autocast, device, attends_by_products(plan.recipe, plan.ds_config, device))


def rank_memory(
    plan: RunPlan, rank: int, device: str, recomputed: bool | int | None = None, trials: Trials | None = None
) -> RankMemory:
    """Of the rank with this number, over all stages of the recipe. `recomputed`: in the place of the recipe's
    `training.activation_checkpointing`. `trials`: what was found on fake tensors before, which is added to."""
    mesh, trials = plan.mesh._replace(rank=rank), trials or Trials()
    if recomputed is None:
        recomputed = recomputed_blocks(plan.recipe)
    states, numbers, found = states_of(plan, mesh, trials), numbers_of(plan, device), []
    for batch, here in {(stage.batch, rows_here(plan, stage, device)) for stage in plan.stages}:
        layers = trials.layers(plan.recipe, mesh, here, numbers)
        held = _of_rank(plan, mesh, layers, recomputed)
        found.append(_walk(plan, mesh, states, held, batch.accumulation, here, at_once=device != "cpu"))
    return max(found, key=lambda each: each.peak)


def largest(
    plan: RunPlan, device: str, recomputed: bool | int | None = None, trials: Trials | None = None
) -> RankMemory:
    """Of the rank that holds most: the stages of a pipeline differ, other layouts cut evenly."""
    trials = trials or Trials()
    found = [rank_memory(plan, rank, device, recomputed, trials) for rank in fullest(plan)]
    return max(found, key=lambda each: each.peak)


def fullest(plan: RunPlan) -> list[int]:
    """The first ranks of the stages of a pipeline that may hold most: both ends, and between them the first with most layers."""
    mesh, bounds = plan.mesh, plan.pipeline_bounds
    layers = [after - before for before, after in pairwise(bounds)] or [0]
    between = range(1, max(1, mesh.pipeline - 1))
    stages = {0, mesh.pipeline - 1, max(between, key=lambda stage: (layers[stage], -stage), default=0)}
    return [stage * (mesh.world_size // mesh.pipeline) for stage in sorted(stages)]


def rows_here(plan: RunPlan, stage: Any, device: str) -> RowsHere:
    """On a CPU attention goes document by document, and what it makes of them is put together by a copy."""
    several = device == "cpu" and stage.mean_document_tokens < stage.seq_length
    copies = plan.recipe.objective.copies
    return RowsHere(stage.batch.micro_batch_samples, stage.seq_length * copies, 2 if several else 1)


class _OfRank(NamedTuple):
    """Layers in their order."""

    held: list[LayerBytes]
    shared: int


def _of_rank(plan: RunPlan, mesh: Mesh, layers: Layers, recomputed: bool | int) -> _OfRank:
    entries, model = layer_plan(plan.recipe.model)[:-1], plan.recipe.model
    first, last = plan.pipeline_bounds[mesh.pipeline_rank :][:2] if plan.pipeline_bounds else (0, len(entries))
    held = []
    for entry, kind in [*zip(entries, layers.kinds, strict=True)][first:last]:
        again = entry.cls is Block and is_recomputed(int(entry.name.rpartition(".")[2]), model, recomputed)
        held.append(kind.again if again else kind.plain)
    return _OfRank(held, layers.shared)


def states_of(plan: RunPlan, mesh: Mesh, trials: Trials) -> States:
    """Of the rank of this mesh."""
    config, recipe = plan.ds_config, plan.recipe
    zero = DEFAULTS | {key: value for key, value in config.get("zero_optimization", {}).items() if value is not None}
    stage, w = zero.get("stage", 0), widths(plan)
    place = mesh._replace(rank=mesh.rank - mesh.rank % (mesh.world_size // mesh.pipeline) + mesh.tensor_rank)
    sizes = trials.remembered(
        (tuple(plan.pipeline_bounds), place), lambda: parameter_sizes(recipe.model, plan.pipeline_bounds, place)
    )
    trained, frozen = (sum(size.numel for size in sizes if size.trained == kind) for kind in (True, False))
    among, number = mesh.data * mesh.sequence, mesh.data_rank * mesh.sequence + mesh.sequence_rank
    part = share(trained, among, number)
    kept = config.get("data_types", {}).get("grad_accum_dtype")
    sums = {"fp32": 4, "bf16": 2, "fp16": 2, None: w.weight}[kept]
    offloaded = {
        key: (zero.get(key) or {}).get("device", "none") != "none" for key in ("offload_optimizer", "offload_param")
    }
    weights, buffers = w.weight * (trained + frozen), 0
    fills: tuple[int, ...]
    if stage == 0:
        flat = w.weight * min(trained, FLAT_BUCKET + max((size.numel for size in sizes if size.trained), default=0))
        return States(weights, w.moments * trained, 0, 0, True, flat if among > 1 else 0, 0, 0)
    states = (w.master + w.moments) * part
    if stage == 1 and w.weight < sums and not offloaded["offload_optimizer"]:  # DeepSpeed's BF16_Optimizer
        own = 0 if config["bf16"].get("immediate_grad_update") else w.weight
        return States(
            weights, states, (sums + own) * trained, 0, False, sums * trained if trained < FLAT_BUCKET else 0, 0, 0
        )
    bucket = w.weight * min(zero["reduce_bucket_size"], trained)
    if stage < 3:
        twice = 2 if zero.get("overlap_comm") else 1
        gradients = 0 if stage == 1 else sums * part
        fills, update = (twice * bucket, bucket), 4 * part
    else:
        gradients, buffers, fills = sums * part, bucket, (bucket,)
        update = 4 * share(min(trained, zero["sub_group_size"] * among), among, 0)
        weights = w.weight * share(trained + frozen, among, number)
    host = 0
    if offloaded["offload_optimizer"]:
        device = zero["offload_optimizer"]["device"]
        host, states = (states + gradients + w.weight * part) * (device == "cpu"), 0
        gradients = 0
    if stage == 3 and offloaded["offload_param"]:
        host, weights = host + weights * (zero["offload_param"]["device"] == "cpu"), 0
    return States(weights, states, gradients, buffers, stage == 1, 0, update, host, fills)


def _walk(
    plan: RunPlan,
    mesh: Mesh,
    states: States,
    layers: _OfRank,
    accumulation: int,
    tokens: RowsHere,
    at_once: bool,
) -> RankMemory:
    peak = (0, 0, 0, "")
    if at_once:
        states = states._replace(buffers=states.buffers + sum(states.fills), fills=())
    # gradients that stay move to the first bucket and add nothing
    fills = states.fills[1:] if states.stay else states.fills
    fetched = _Fetched(plan, mesh)
    kept = sum(each.kept for each in layers.held)
    under_way = min(mesh.pipeline - mesh.pipeline_rank, accumulation)
    travelling = _travelling(plan, mesh, tokens)
    gradients, last = 0, len(layers.held) - 1

    def note(activations: int, weights: int, more: int, phase: str) -> None:
        nonlocal peak
        peak = max(peak, (activations + weights + more, activations, weights, phase))

    turns = min(accumulation, 2)
    for turn in range(turns):
        others = max(0, min(under_way, accumulation - turn) - 1)  # after the first backward pass one fewer may be left
        now = others * (kept + layers.shared + travelling) + layers.shared + 2 * travelling
        for place, held in enumerate(layers.held):
            note(now + held.forward, fetched.at(place), gradients, "forward")
            now += held.kept
        reduced = 0
        for place, held in reversed([*enumerate(layers.held)]):
            now -= held.kept
            first = states.stay and turn == 0
            own = held.backward + (held.largest if first and place < last else 0)
            note(now + own, fetched.at(place), gradients + sum(min(size, reduced) for size in fills), "backward")
            gradients += held.gradients if first else 0
            # a pipeline reduces after its last backward pass
            if mesh.pipeline == 1 and (not states.stay or turn == turns - 1):
                reduced += held.gradients
    filled = sum(min(size, sum(held.gradients for held in layers.held)) for size in fills)
    note(0, 0, gradients + filled + states.reduction, "update")
    note(0, 0, (gradients if not states.update else min(gradients, states.update)) + states.update, "update")
    _, activations, gathered, phase = peak
    more = peak[0] - activations - gathered
    grown = min(more, gradients)
    return RankMemory(
        states.weights + gathered,
        states.gradients + grown,
        states.optimizer,
        states.buffers + more - grown,
        activations,
        states.host,
        phase,
    )


def _travelling(plan: RunPlan, mesh: Mesh, tokens: RowsHere) -> int:
    """What a rank of a pipeline receives and sends on for a micro-batch, and as much again to receive the next into."""
    if mesh.pipeline == 1:
        return 0
    rows = tokens.rows * tokens.length // mesh.sequence // (mesh.tensor if mesh.split_rows else 1)
    one = widths(plan).weight * rows * plan.recipe.model.hidden_size
    return one * ((mesh.pipeline_rank > 0) + (mesh.pipeline_rank < mesh.pipeline - 1))


class _Fetched:
    """Bytes of whole parameters that stage 3 has in place, beside its own part, while it works on a layer.

    A layer's stay after its forward pass where its backward pass is less than `stage3_max_reuse_distance` elements away.
    """

    def __init__(self, plan: RunPlan, mesh: Mesh) -> None:
        zero = DEFAULTS | plan.ds_config.get("zero_optimization", {})
        self.width = widths(plan).weight if zero.get("stage") == 3 else 0
        if not self.width:
            return
        of_layers = sizes_of_layers(plan, mesh)
        small = zero["stage3_param_persistence_threshold"]
        self.always = sum(size for sizes in of_layers for size in sizes if size <= small)
        self.sizes = [sum(size for size in sizes if size > small) for sizes in of_layers]
        self.ahead = min(zero["stage3_prefetch_bucket_size"], max(self.sizes))
        after, stay = 0, list[bool]()
        for size in reversed(self.sizes):
            stay.append(2 * after <= zero["stage3_max_reuse_distance"])
            after += size
        kept = [size * stays for size, stays in zip(self.sizes, reversed(stay), strict=True)]
        self.before = [0, *accumulate(kept)]

    def at(self, place: int) -> int:
        """While it works on the layer there, forward or backward."""
        if not self.width:
            return 0
        return self.width * (self.always + self.before[place] + self.sizes[place] + self.ahead)


def sizes_of_layers(plan: RunPlan, mesh: Mesh) -> list[list[int]]:
    """Elements of the parameters that each layer of a rank holds, the last norm and the head as one."""
    entries = layer_plan(plan.recipe.model)
    first, last = plan.pipeline_bounds[mesh.pipeline_rank :][:2] if plan.pipeline_bounds else (0, len(entries))
    flat, found, known = [size.numel for size in parameter_sizes(plan.recipe.model, plan.pipeline_bounds, mesh)], [], {}
    place = 0
    for entry in entries[first:last]:
        kind = kind_of_layer(entry)
        if kind not in known:
            with torch.device("meta"):
                known[kind] = len(list(entry.build(0).parameters()))
        found.append(flat[place : place + known[kind]])
        place += known[kind]
    if len(found) > 1 and entries[first:last][-1].name == "lm_head":
        found[-2:] = [found[-2] + found[-1]]
    return found
