"""Put weights and optimizer states of a checkpoint into a live engine of any ZeRO stage, each rank what it keeps.

This is how a checkpoint continues in another layout: without intermediate files, and with no more memory than one buffer. What
several ranks keep alike (data-parallel ones at stage 0) is read by one of them and broadcast.
"""

import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from engine.checkpoint.deepspeed_files import CheckpointFiles
from engine.checkpoint.division import dealt
from engine.engine import Engine
from engine.layout.held import Held, held
from engine.optimizer import Guarded


def transplant(engine: Engine, files: CheckpointFiles) -> None:
    """Overwrite all parameters and moments of a fresh engine. Collective over all ranks.

    Raises ValueError for an optimizer wrapper whose states this does not know (fp16 at stage 0, for example).
    """
    wrapper = engine.optimizer
    if isinstance(wrapper, DeepSpeedZeroOptimizer_Stage3):
        wrapper.checkpoint_event_prologue()
        _into_vectors(engine, files)
        _take_over_at_stage_3(wrapper)
    elif isinstance(wrapper, DeepSpeedZeroOptimizer | BF16_Optimizer):
        _into_vectors(engine, files)
        wrapper.update_lp_params()
    elif isinstance(wrapper, Guarded):
        _into_parameters(engine, files)
    else:
        raise ValueError(
            f"checkpoints of another layout cannot be continued under DeepSpeed's {type(wrapper).__name__}"
        )


def _into_vectors(engine: Engine, files: CheckpointFiles) -> None:
    """Every rank reads its shares."""
    for share in held(engine.optimizer, engine.module):
        for key, vector in _start(engine, share, files).items():
            _read(engine, files, share, key, vector)


def _read(engine: Engine, files: CheckpointFiles, share: Held, key: str, vector: torch.Tensor) -> None:
    piece = files.division.slice(share.name, engine.mesh.tensor_rank, engine.mesh.tensor)
    files.read(share.name, key, piece, share.elements, vector, share.offset)


def _into_parameters(engine: Engine, files: CheckpointFiles) -> None:
    """Every parameter is read by one of the ranks that keep it, straight into place, and broadcast from there."""
    shares = {share.name: share for share in held(engine.optimizer, engine.module)}
    groups = engine.optimizer.groups
    group = groups.replicas if groups else dist.group.WORLD
    ranks = dist.get_process_group_ranks(group)
    for name, reader in dealt({name: len(share.elements) for name, share in shares.items()}, len(ranks)).items():
        for key, vector in _start(engine, shares[name], files).items():
            if ranks[reader] == dist.get_rank():
                _read(engine, files, shares[name], key, vector)
            if len(ranks) > 1:
                dist.broadcast(vector, src=ranks[reader], group=group)


def _take_over_at_stage_3(wrapper: DeepSpeedZeroOptimizer_Stage3) -> None:
    """The half precision weights of the float32 ones."""
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


def _start(engine: Engine, share: Held, files: CheckpointFiles) -> dict[str, torch.Tensor]:
    """What takes weight and moments, flattened; moments are made if they are not there yet, at the parameter's step."""
    optimizer, keys, step = engine.base_optimizer, files.moments(share.name), files.step(share.name)
    state = optimizer.state[share.holder]
    for key in keys:
        if key not in state:
            state[key] = torch.zeros_like(share.holder.data)
    if keys:
        is_cpu_adam = isinstance(optimizer, DeepSpeedCPUAdam)
        state["step"] = step if is_cpu_adam else torch.tensor(float(step), device=share.holder.device)
    tensors = {"weight": share.holder.detach(), **{key: state[key] for key in keys}}
    return {key: tensor.view(-1) for key, tensor in tensors.items()}
