"""How the states of a run would be divided, from its model and layout alone: no ranks, no files, no memory."""

import itertools
from math import prod

import torch
from torch import nn

from engine.checkpoint.division import Division, PartDivision, Shapes, slice_at
from engine.checkpoint.manifest import StateLayout
from engine.layout.slices import cut_dimensions
from model.config import ModelConfig
from model.llama import Block, Layer, layer_plan
from training.optimizer import parameter_groups
from training.sections import OptimizerConfig

ALIGNMENT = 2
"""DeepSpeed rounds a flat vector up to so many elements a rank."""


def foreseen_division(config: ModelConfig, optimizer: OptimizerConfig, layout: StateLayout) -> Division:
    """What a checkpoint of this layout would hold, and where."""
    plan, dimensions = layer_plan(config), cut_dimensions(config)
    bounds, ranks = layout.stage_bounds, layout.world_size // layout.parts
    stages = [_in_pipeline(plan, plan[low:high]) for low, high in itertools.pairwise(bounds)]
    parts = []
    for layers in stages or [_in_one_module(plan)]:
        groups = _groups(layers, optimizer, in_stages=bool(stages))
        for tensor_rank in range(layout.tensor):
            cut = [{name: _cut(s, dimensions[name], tensor_rank, layout) for name, s in g.items()} for g in groups]
            step = ALIGNMENT * ranks
            totals = [sum(map(prod, shapes.values())) for shapes in cut]
            sizes = [-(-total // step) * ALIGNMENT for total in totals]
            parts.append(PartDivision(layout.zero_stage, ranks, cut, sizes))
    return Division(parts, layout.tensor, dimensions)


def _in_one_module(plan: list[Layer]) -> list[Layer]:
    """In the order in which `model.llama.Llama` registers them."""
    untied = [entry for entry in plan if not entry.tied_to]
    return sorted(untied, key=lambda entry: entry.cls is not Block)


def _in_pipeline(plan: list[Layer], stage: list[Layer]) -> list[Layer]:
    """Tied ones first, each as the layer whose weights it has."""
    sources = {entry.tied_to for entry in plan if entry.tied_to}
    layers = [next(e for e in plan if e.name == entry.tied_to) if entry.tied_to else entry for entry in stage]
    return sorted(layers, key=lambda entry: entry.name not in sources)


def _groups(layers: list[Layer], optimizer: OptimizerConfig, in_stages: bool) -> list[Shapes]:
    """Whole shapes by name, in the optimizer's groups."""
    with torch.device("meta"):
        modules = nn.ModuleDict({entry.name.replace(".", "/"): entry.build(seed=0) for entry in layers})
    names = {p: name.replace("/", ".") for name, p in modules.named_parameters()}
    groups = parameter_groups(modules, optimizer, in_stages)
    return [{names[p]: tuple(p.shape) for p in group["params"]} for group in groups]


def _cut(shape: tuple[int, ...], dimension: int | None, tensor_rank: int, layout: StateLayout) -> tuple[int, ...]:
    if dimension is None:
        return shape
    piece, inner = slice_at(shape, dimension, tensor_rank, layout.tensor), prod(shape[dimension + 1 :])
    return (*shape[:dimension], piece.columns // inner, *shape[dimension + 1 :])
