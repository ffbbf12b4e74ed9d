"""Tells Muon where a live engine has the pieces of the matrices that it updates as a whole."""

from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from engine.engine import Engine
from engine.layout.groups import Groups
from engine.layout.held import Held, held
from engine.layout.names import named_parameters
from engine.layout.slices import cut_dimensions
from training.config import Recipe
from training.muon import Decayed, Exchange, Matrix, Muon, Piece


def names_of_matrices(model: nn.Module, optimizer: torch.optim.Optimizer) -> set[str]:
    """In the layer plan, of those that Muon updates and this rank's part of a pipeline has; before ZeRO replaces parameters."""
    matrices = {id(p) for group in optimizer.param_groups if group.get("name") == "muon" for p in group["params"]}
    return {name for name, parameter in named_parameters(model) if id(parameter) in matrices}


def place_matrices(engine: Engine, muon: Muon, names: set[str], recipe: Recipe, groups: Groups) -> None:
    """`names`: of the matrices. Collective over all ranks."""
    config, decay, mesh = recipe.model, recipe.optimizer.weight_decay, engine.mesh
    group = groups.holders if engine.zero_stage else groups.tensor if mesh.tensor > 1 else None
    ours = {
        share.name: Piece(mesh.tensor_rank, share.elements.start, len(share.elements)) for share in _held(engine, names)
    }
    of_ranks: list[Any] = [ours]
    if group is not None:
        of_ranks = [None] * group.size()
        dist.all_gather_object(of_ranks, ours, group=group)
    dimensions, parameters = cut_dimensions(config), dict(named_parameters(engine.module))
    shapes = {name: list(getattr(parameters[name], "ds_shape", parameters[name].shape)) for name in names}
    for name, shape in shapes.items():
        shape[dimensions[name] or 0] *= mesh.tensor

    def find() -> list[Matrix]:
        return [
            Matrix(
                (shapes[share.name][0], shapes[share.name][1]),
                dimensions[share.name] or 0,
                mesh.tensor,
                [pieces[share.name] for pieces in of_ranks],
                share.holder,
                share.offset,
            )
            for share in _held(engine, names)
        ]

    def decayed() -> list[Decayed]:
        """The head at the end of a pipeline (see `training.optimizer.parameter_groups`)."""
        shares = _held(engine, {"lm_head.weight"} & parameters.keys())
        return [Decayed(s.holder, slice(s.offset, s.offset + len(s.elements)), decay) for s in shares]

    muon.place(Exchange(group, engine.device), find, decayed if engine.pipeline_bounds else list)
    assert all(sum(piece.numel for piece in matrix.pieces) == prod(matrix.shape) for matrix in find())


def _held(engine: Engine, names: set[str]) -> list[Held]:
    return [share for share in held(engine.optimizer, engine.module) if share.name in names]
