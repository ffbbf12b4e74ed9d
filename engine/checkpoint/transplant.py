"""Put weights and optimizer states of a checkpoint into a live engine of any ZeRO stage, each rank what it keeps.

This is how a checkpoint continues in another layout: without intermediate files, and with no more memory than one buffer. What
several ranks keep alike (data-parallel ones at stage 0) is read by one of them and broadcast.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from engine.checkpoint.deepspeed_files import CheckpointFiles
from engine.checkpoint.division import dealt
from engine.engine import Engine
from engine.layout.names import named_parameters
from engine.optimizer import Guarded


class Keep(NamedTuple):
    """Elements of a parameter (of this rank's slice of it, flattened) that this rank keeps, and where."""

    name: str
    elements: range
    vectors: dict[str, torch.Tensor]
    """By key, "weight" or a moment: what takes them, [N]."""
    offset: int
    """Of the first of them in the vectors."""


def transplant(engine: Engine, files: CheckpointFiles) -> None:
    """Overwrite all parameters and moments of a fresh engine. Collective over all ranks.

    Raises ValueError for an optimizer wrapper whose states this does not know (fp16 at stage 0, for example).
    """
    wrapper = engine.optimizer
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        _into_stage_3(engine, files)
    elif isinstance(wrapper, DeepSpeedZeroOptimizer | BF16_Optimizer):
        for keep in _kept_at_stages_1_and_2(engine, files):
            _read(engine, files, keep)
        wrapper.update_lp_params()
    elif isinstance(wrapper, Guarded):
        _into_stage_0(engine, files)
    else:
        raise ValueError(
            f"checkpoints of another layout cannot be continued under DeepSpeed's {type(wrapper).__name__}"
        )


def _read(engine: Engine, files: CheckpointFiles, keep: Keep) -> None:
    piece = files.division.slice(keep.name, engine.mesh.tensor_rank, engine.mesh.tensor)
    for key, vector in keep.vectors.items():
        files.read(keep.name, key, piece, keep.elements, vector.detach(), keep.offset)


def _into_stage_0(engine: Engine, files: CheckpointFiles) -> None:
    """Every parameter is read by one of the ranks that keep it, straight into place, and broadcast from there."""
    parameters = dict(named_parameters(engine.module))
    ranks, group = _replicas(engine)
    for name, reader in dealt({name: p.numel() for name, p in parameters.items()}, len(ranks)).items():
        parameter = parameters[name]
        tensors = {"weight": parameter.data, **_start(engine, name, parameter, files)}
        keep = Keep(name, range(parameter.numel()), {key: tensor.view(-1) for key, tensor in tensors.items()}, 0)
        if ranks[reader] == dist.get_rank():
            _read(engine, files, keep)
        for vector in keep.vectors.values() if len(ranks) > 1 else ():
            dist.broadcast(vector, src=ranks[reader], group=group)
    if group is not None:
        dist.destroy_process_group(group)


def _replicas(engine: Engine) -> tuple[list[int], dist.ProcessGroup | None]:
    """The ranks that hold the same part of the model as this one, and their group; None: all ranks, or this one alone."""
    mine, own = [], None
    for ranks in engine.mesh.groups_along("data", "sequence"):
        group = dist.new_group(ranks) if 1 < len(ranks) < engine.mesh.world_size else None
        if engine.mesh.rank in ranks:
            mine, own = ranks, group
    return mine, own


def _kept_at_stages_1_and_2(engine: Engine, files: CheckpointFiles) -> Iterator[Keep]:
    """A parameter's `_hp_mapping` says which of its elements lie where in this rank's flat vector; none: not here."""
    wrapper = engine.optimizer
    groups = wrapper.bf16_groups if isinstance(wrapper, BF16_Optimizer) else wrapper.bit16_groups
    number = {id(parameter): index for index, group in enumerate(groups) for parameter in group}
    parameters: Iterator[tuple[str, Any]] = named_parameters(engine.module)
    for name, parameter in parameters:
        (flat,) = engine.base_optimizer.param_groups[number[id(parameter)]]["params"]
        moments, mapping = _start(engine, name, flat, files), parameter._hp_mapping
        if mapping is None:
            continue
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        elements = range(there.start, there.start + there.numel)
        yield Keep(name, elements, {"weight": flat, **moments}, here.start)


def _into_stage_3(engine: Engine, files: CheckpointFiles) -> None:
    """Each rank's share of a parameter stands in the flat vector of its sub-group, in the order of the group."""
    wrapper = engine.optimizer
    rank = dist.get_rank(wrapper.dp_process_group)
    wrapper.checkpoint_event_prologue()
    names = {id(parameter): name for name, parameter in named_parameters(engine.module)}
    for group, flat in zip(wrapper.fp16_groups, wrapper.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in group:
            name, share = names[id(parameter)], parameter.partition_numel()
            elements = range(min(rank * share, parameter.ds_numel), min((rank + 1) * share, parameter.ds_numel))
            vectors = {"weight": flat, **_start(engine, name, flat, files)}
            _read(engine, files, Keep(name, elements, vectors, offset))
            offset += share
    for half, flat, parts in zip(
        wrapper.fp16_partitioned_groups_flat,
        wrapper.fp32_partitioned_groups_flat,
        wrapper.fp16_partitioned_groups,
        strict=True,
    ):
        half.data.copy_(flat.data)
        for part, value in zip(parts, wrapper.unflatten(half, parts), strict=True):
            part.data = value.data
    wrapper.checkpoint_event_epilogue()


def _start(engine: Engine, name: str, target: torch.Tensor, files: CheckpointFiles) -> dict[str, torch.Tensor]:
    """The base optimizer's moments of one of its tensors, made if they are not there yet, at the parameter's step."""
    optimizer, keys, step = engine.base_optimizer, files.moments(name), files.step(name)
    state = optimizer.state[target]
    for key in keys:
        if key not in state:
            state[key] = torch.zeros_like(target.data)
    is_cpu_adam = isinstance(optimizer, DeepSpeedCPUAdam)
    state["step"] = step if is_cpu_adam else torch.tensor(float(step), device=target.device)
    return {key: state[key] for key in keys}
