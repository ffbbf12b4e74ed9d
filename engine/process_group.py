"""The process group of a run, and what has to be set before it exists."""

import datetime
import warnings

from engine import internals
from engine.safe_load import force_everywhere
from launch.links import watch_links
from launch.rank import PRESENT, meet
from launch.topology import Topology, fill_environment


def start_process_group(topology: Topology, collective_timeout_minutes: float = 30.0) -> None:
    """Join the other ranks. Must come before anything that communicates, zero.Init included.

    Raises LostPeer when a rank does not come.
    """
    fill_environment(topology)

    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    force_everywhere()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of names DeepSpeed uses
    internals.leave_out_shared_memory_collective()
    backend = "gloo" if topology.device.type == "cpu" else "nccl"
    timeout = datetime.timedelta(minutes=collective_timeout_minutes)
    internals.set_timeout_of_groups(timeout)
    roll_call = meet(topology) if topology.world_size > 1 else None
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)
    if roll_call:
        roll_call.read_places()
        PRESENT.append(roll_call)
    if topology.world_size > topology.local_size:
        watch_links()
