"""`training.activation_checkpointing: auto`: as many blocks are recomputed as a run needs to fit where it starts."""

import psutil
import torch
import torch.distributed as dist

from engine.process_group import start_process_group
from engine.run.plan import RunPlan
from launch.topology import Topology
from training.environment import environment, free_memory_bytes


def start_decided(plan: RunPlan, topology: Topology) -> RunPlan:
    """Start the process group; returns the plan with a number of blocks in the place of `auto`.

    The first rank decides by its device and host for all, and says so. Collective over all ranks. Raises ValueError on
    all of them where nothing fits.
    """
    minutes = plan.recipe.training.collective_timeout_minutes
    if plan.recipe.training.activation_checkpointing != "auto":
        start_process_group(topology, minutes)
        return plan

    from planner.search import with_recomputed

    found: list[int | str] = [""]
    if topology.is_first:  # on fake tensors, whose ranks need that there are no real ones yet
        found = [_decide(plan, topology)]
    start_process_group(topology, minutes)
    dist.broadcast_object_list(found, 0, device=topology.device)
    (decided,) = found
    if isinstance(decided, str):
        raise ValueError(decided)
    return with_recomputed(plan, decided)


def _decide(plan: RunPlan, topology: Topology) -> int | str:
    """How many blocks, or why none are enough."""
    from planner.activations import Trials
    from planner.hardware import Device, Hardware
    from planner.search import SHARE_FOR_LIBRARIES, gib, least_recomputed, room_of

    here, cuda = topology.local_size, topology.device.type == "cuda"
    host = min(psutil.virtual_memory().total, free_memory_bytes(torch.device("cpu")))
    memory = torch.cuda.get_device_properties(topology.device).total_memory if cuda else host // here
    device = Device(name=environment()["cpu"], kind=topology.device.type, memory=memory)
    hardware = Hardware(device=device, devices=topology.world_size, devices_per_node=here, host_memory=host)
    fits, reason = least_recomputed(plan, hardware, Trials())
    if fits is None:
        return (
            f"training.activation_checkpointing auto: {reason}: take fewer rows a micro-batch or more ranks "
            "(python -m tools.plan says which), or say how many blocks yourself"
        )
    blocks, of_rank = fits
    whole = "its device" if cuda else f"a rank's share of the host, of {here}"
    print(
        f"activation checkpointing: {blocks} of {plan.recipe.model.num_hidden_layers} blocks are recomputed; a rank holds "
        f"{gib(of_rank.peak)} of {gib(room_of(hardware))}, {1 - SHARE_FOR_LIBRARIES:.0%} of {whole}",
        flush=True,
    )
    return blocks
