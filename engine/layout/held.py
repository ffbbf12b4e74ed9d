"""Where a live engine has the elements of its parameters: in each by itself, or in flat vectors that ZeRO steps."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from engine.layout.mesh import Mesh
from engine.layout.names import named_parameters
from engine.layout.slices import cut_dimensions
from model.config import ModelConfig


class Held(NamedTuple):
    """Elements of a parameter (of this rank's slice of it, flattened) that this rank updates, possibly none."""

    name: str
    elements: range
    holder: torch.Tensor
    """What the base optimizer updates: the parameter or a flat vector."""
    offset: int
    """Of the first of them in the holder."""


def held(wrapper: Any, module: nn.Module) -> Iterator[Held]:
    """Of every trained parameter of the layer plan that is on this rank, in the same order on all that have the same ones.

    `wrapper`: what DeepSpeed has put around the base optimizer.
    """
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        return _at_stage_3(wrapper, module)
    if isinstance(wrapper, DeepSpeedZeroOptimizer | BF16_Optimizer):
        return _at_stages_1_and_2(wrapper, module)
    return (Held(name, range(p.numel()), p, 0) for name, p in named_parameters(module) if p.requires_grad)


def counted_once(wrapper: Any, module: nn.Module, mesh: Mesh, config: ModelConfig) -> Iterator[Held]:
    """Of `held` what no other rank of the mesh has as well, or is the first to have."""
    partitioned = isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3 | DeepSpeedZeroOptimizer | BF16_Optimizer)
    if not partitioned and (mesh.data_rank or mesh.sequence_rank):
        return
    dimensions, tied = cut_dimensions(config), config.tie_word_embeddings and mesh.pipeline > 1
    for share in held(wrapper, module):
        if tied and mesh.pipeline_rank and share.name.startswith("embed_tokens."):
            continue  # the last rank's copy
        if mesh.tensor_rank == 0 or dimensions[share.name] is not None:
            yield share


def _at_stages_1_and_2(wrapper: Any, module: nn.Module) -> Iterator[Held]:
    """A parameter's `_hp_mapping` says which of its elements lie where in this rank's flat vector; none: not here."""
    is_bf16 = isinstance(wrapper, BF16_Optimizer)
    groups = wrapper.bf16_groups if is_bf16 else wrapper.bit16_groups
    vectors = wrapper.fp32_groups_flat_partition if is_bf16 else wrapper.single_partition_of_fp32_groups
    vector_of = {id(p): vector for group, vector in zip(groups, vectors, strict=True) for p in group}
    parameters: Iterator[tuple[str, Any]] = named_parameters(module)
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        vector, mapping = vector_of[id(parameter)], parameter._hp_mapping
        if mapping is None:
            yield Held(name, range(0), vector, 0)
            continue
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        yield Held(name, range(there.start, there.start + there.numel), vector, here.start)


def _at_stage_3(wrapper: Any, module: nn.Module) -> Iterator[Held]:
    """Each rank's share of a parameter stands in the flat vector of its sub-group, in the order of the group."""
    rank = dist.get_rank(wrapper.dp_process_group)
    names = {id(parameter): name for name, parameter in named_parameters(module)}
    for group, vector in zip(wrapper.fp16_groups, wrapper.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in group:
            share, numel = parameter.partition_numel(), parameter.ds_numel
            elements = range(min(rank * share, numel), min((rank + 1) * share, numel))
            yield Held(names[id(parameter)], elements, vector, offset)
            offset += share
