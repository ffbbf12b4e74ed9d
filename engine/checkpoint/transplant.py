"""Put weights and optimizer states, one parameter at a time, into a live engine of any ZeRO stage.

With `engine.checkpoint.deepspeed_files.read_states` on the other side this is how a checkpoint continues in another
layout: no intermediate files, and no more memory than the largest parameter.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from engine.checkpoint.deepspeed_files import ParameterState
from engine.engine import Engine
from engine.layout.names import named_parameters
from engine.layout.slices import cut_dimensions, slice_of
from engine.optimizer import Guarded


def transplant(engine: Engine, states: Iterable[ParameterState]) -> None:
    """Overwrite all parameters and moments of a fresh engine. Every rank reads all states and keeps its part.

    Raises ValueError for an optimizer wrapper whose states this does not know (fp16 at stage 0, for example).
    """
    wrapper = engine.optimizer
    if engine.mesh.tensor > 1:
        states = _parts(engine, states)
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        _into_stage_3(engine, states)
    elif isinstance(wrapper, DeepSpeedZeroOptimizer | BF16_Optimizer):
        _into_stages_1_and_2(engine, states)
    elif isinstance(wrapper, Guarded):
        _into_stage_0(engine, states)
    else:
        raise ValueError(
            f"checkpoints of another layout cannot be continued under DeepSpeed's {type(wrapper).__name__}"
        )


def _parts(engine: Engine, states: Iterable[ParameterState]) -> Iterator[ParameterState]:
    """What this rank of a tensor-parallel group has of each parameter."""
    config: Any = engine.module.config
    mesh, dimensions = engine.mesh, cut_dimensions(config)
    for name, weight, moments, step in states:
        place = dimensions[name], mesh.tensor_rank, mesh.tensor
        yield ParameterState(name, slice_of(weight, *place), {k: slice_of(m, *place) for k, m in moments.items()}, step)


def _into_stage_0(engine: Engine, states: Iterable[ParameterState]) -> None:
    parameters = dict(named_parameters(engine.module))
    for state in states:
        parameter = parameters.pop(state.name)
        parameter.data.copy_(state.weight)
        moments = _start(engine, parameter, state)
        for key, value in state.moments.items():
            moments[key].copy_(value)
    assert not parameters, f"no states for {sorted(parameters)}"


def _into_stages_1_and_2(engine: Engine, states: Iterable[ParameterState]) -> None:
    """A parameter's `_hp_mapping` says which of its elements lie where in this rank's flat vector; none: not here."""
    wrapper = engine.optimizer
    parameters: dict[str, Any] = dict(named_parameters(engine.module))
    groups = wrapper.bf16_groups if isinstance(wrapper, BF16_Optimizer) else wrapper.bit16_groups
    number = {id(parameter): index for index, group in enumerate(groups) for parameter in group}
    for state in states:
        if (parameter := parameters.pop(state.name, None)) is None:
            continue  # of another pipeline stage
        (flat,) = engine.base_optimizer.param_groups[number[id(parameter)]]["params"]
        moments, mapping = _start(engine, flat, state), parameter._hp_mapping
        if mapping is None:
            continue
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        for target, value in [(flat, state.weight), *((moments[k], value) for k, value in state.moments.items())]:
            target.data.narrow(0, here.start, here.numel).copy_(value.flatten().narrow(0, there.start, there.numel))
    assert not parameters, f"no states for {sorted(parameters)}"
    wrapper.update_lp_params()


def _into_stage_3(engine: Engine, states: Iterable[ParameterState]) -> None:
    """Each rank's share of a parameter stands in the flat vector of its sub-group, in the order of the group."""
    wrapper = engine.optimizer
    rank = dist.get_rank(wrapper.dp_process_group)
    wrapper.checkpoint_event_prologue()
    names = {id(parameter): name for name, parameter in named_parameters(engine.module)}
    places = {}
    for group, flat in zip(wrapper.fp16_groups, wrapper.fp32_partitioned_groups_flat, strict=True):
        offset = 0
        for parameter in group:
            places[names[id(parameter)]] = flat, offset, parameter.partition_numel()
            offset += parameter.partition_numel()
    for state in states:
        flat, offset, share = places.pop(state.name)
        moments = _start(engine, flat, state)
        for target, value in [(flat, state.weight), *((moments[k], value) for k, value in state.moments.items())]:
            part = value.flatten()[rank * share :][:share]
            target.data.narrow(0, offset, len(part)).copy_(part)
    assert not places, f"no states for {sorted(places)}"
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


def _start(engine: Engine, target: torch.Tensor, given: ParameterState) -> dict:
    """The base optimizer's state of one of its tensors, made if it is not there yet."""
    optimizer = engine.base_optimizer
    state = optimizer.state[target]
    for key in given.moments:
        if key not in state:
            state[key] = torch.zeros_like(target.data)
    is_cpu_adam = isinstance(optimizer, DeepSpeedCPUAdam)
    state["step"] = given.step if is_cpu_adam else torch.tensor(float(given.step), device=target.device)
    return state
