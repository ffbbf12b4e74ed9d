"""Blocks as the ranks of a tensor or sequence group run them, which wait for each other at every exchange.

What that takes is more than the exchanges by themselves: ranks do not come to them at the same moment, and find less in their
caches. Legend: B rows, T tokens of a row, t = T / n those of each of n sequence ranks, D model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from engine.attention_kernel import attends_by_products
from engine.layout.groups import Groups
from engine.layout.tensor import Parts, divide_layer
from engine.run.plan import RunPlan
from model.attention import use_products
from model.documents import Documents
from model.llama import Block, layer_plan


def coupled_blocks(plan: RunPlan, number: int, device: torch.device, dtype: torch.dtype) -> CoupledBlocks | None:
    """None where no rank waits for another inside of a block, or with adapters, which these do without."""
    alone = plan.mesh.tensor * plan.mesh.sequence == 1 or plan.recipe.adapters.names
    return None if alone else CoupledBlocks(plan, number, device, dtype)


class CoupledBlocks:
    """The last blocks of a plan, divided over the ranks that share them. To be made by all ranks."""

    def __init__(self, plan: RunPlan, number: int, device: torch.device, dtype: torch.dtype) -> None:
        self.mesh, self.device, groups = plan.mesh, device, Groups(plan.mesh)
        layers = [layer for layer in layer_plan(plan.recipe.model) if layer.cls is Block][-number:]
        self.blocks = nn.ModuleList(layer.build(0) for layer in layers)
        if self.mesh.tensor > 1:
            parts = Parts(groups.tensor, self.mesh)
            self.blocks = nn.ModuleList(divide_layer(block, plan.recipe.model, parts) for block in self.blocks)
        if self.mesh.sequence > 1:
            from engine.layout.sequence import share_rows  # which loads DeepSpeed

            share_rows(self.blocks, groups.sequence, self.mesh)
        if attends_by_products(plan.recipe, plan.ds_config, device.type):
            use_products(self.blocks)
        self.blocks.to(device, dtype)
        self.dtype, self.width = dtype, plan.recipe.model.hidden_size

    def input_and_pass(self, position_ids: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        """For whole rows [B, T]: vectors of the tokens that this rank has, and what runs all blocks on them."""
        documents, n = Documents.from_position_ids(position_ids.contiguous(), self.device), self.mesh.sequence
        tokens = position_ids.shape[1] // n
        if n > 1:
            first = self.mesh.sequence_rank * tokens
            documents = documents.part(slice(first, first + tokens))
        tokens //= self.mesh.tensor if self.mesh.split_rows else 1
        x = torch.randn(len(position_ids), tokens, self.width, device=self.device, dtype=self.dtype)

        def forward() -> Tensor:
            y = x
            for block in self.blocks:
                y = block(y, documents)
            return y

        return x, forward
