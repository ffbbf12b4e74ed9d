"""Tells `SeparateAdamW` which elements of a live engine's vectors each rank counts in the norm of a group."""

import torch
import torch.distributed as dist

from engine.engine import Engine
from engine.layout.held import counted_once, held
from training.config import Recipe
from training.separate_adamw import SeparateAdamW


def place_groups(engine: Engine, optimizer: SeparateAdamW, recipe: Recipe) -> None:
    """Collective over all ranks from the first step on."""
    found: dict[int, list[slice]] = {}

    def counted(holder: torch.Tensor) -> list[slice]:
        if id(holder) not in found:  # all at once: a model has thousands of parameters
            found.update({id(share.holder): [] for share in held(engine.optimizer, engine.module)})
            for share in counted_once(engine.optimizer, engine.module, engine.mesh, recipe.model):
                place = slice(share.offset, share.offset + len(share.elements))
                found[id(share.holder)].append(place)
        return found[id(holder)]

    def sum_over_ranks(square: torch.Tensor) -> torch.Tensor:
        total = square.to(engine.device)
        dist.all_reduce(total)
        return total.cpu()

    optimizer.place(counted, sum_over_ranks)
