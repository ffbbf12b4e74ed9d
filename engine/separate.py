"""Tells `SeparateAdamW` which elements of a live engine's vectors each rank counts in the norm of a group."""

import torch
import torch.distributed as dist

from engine.engine import Engine
from engine.layout.held import held
from engine.layout.slices import cut_dimensions
from training.config import Recipe
from training.separate_adamw import SeparateAdamW


def place_groups(engine: Engine, optimizer: SeparateAdamW, recipe: Recipe) -> None:
    """Collective over all ranks from the first step on."""
    mesh, dimensions = engine.mesh, cut_dimensions(recipe.model)
    first_replica = bool(engine.zero_stage) or mesh.data_rank == mesh.sequence_rank == 0

    found: dict[int, list[slice]] = {}

    def counted(holder: torch.Tensor) -> list[slice]:
        if id(holder) not in found:  # all at once: a model has thousands of parameters
            for share in held(engine.optimizer, engine.module):
                slices = found.setdefault(id(share.holder), [])
                if first_replica and (mesh.tensor_rank == 0 or dimensions[share.name] is not None):
                    slices.append(slice(share.offset, share.offset + len(share.elements)))
        return found[id(holder)]

    def sum_over_ranks(square: torch.Tensor) -> torch.Tensor:
        total = square.to(engine.device)
        dist.all_reduce(total)
        return total.cpu()

    optimizer.place(counted, sum_over_ranks)
