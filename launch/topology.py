"""Who this process is: the only reader of the environment, and the only writer."""

import os
from dataclasses import dataclass
from typing import NamedTuple

import torch

from launch.hostfile import launcher_commands, refuse_missing_hostfile

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Topology:
    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    local_size: int = 1
    """Ranks that this host has."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def read_topology(environment: dict[str, str] | None = None) -> Topology:
    """Read what `deepspeed` or `torchrun` put into the environment; one process when there is nothing.

    Raises ValueError for a half-set environment, which would otherwise train as many separate models, and for a hostfile
    that `deepspeed` did not find.
    """
    choose_accelerator()
    if environment is None:
        refuse_missing_hostfile(launcher_commands())
        environment = dict(os.environ)
    given = {name: environment[name] for name in LAUNCHER_VARIABLES if name in environment}
    if not {"RANK", "WORLD_SIZE"} & set(given):
        rank, local_rank, world_size = 0, 0, 1
    elif missing := [name for name in LAUNCHER_VARIABLES if name not in given]:
        raise ValueError(
            f"the environment has {', '.join(given)} but not {', '.join(missing)}: start train.py with `deepspeed` or "
            "`torchrun`, or with plain `python` and none of these variables"
        )
    else:
        try:
            rank, local_rank, world_size = (int(given[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
        except ValueError:
            raise ValueError(f"RANK, LOCAL_RANK and WORLD_SIZE must be whole numbers, got {given}") from None
        if not 0 <= rank < world_size:
            raise ValueError(f"RANK={rank} is outside 0..{world_size - 1} (WORLD_SIZE={world_size})")
    use_cuda = torch.cuda.is_available() and environment.get("DS_ACCELERATOR", "cuda") == "cuda"
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"LOCAL_RANK={local_rank} but this host has {torch.cuda.device_count()} GPUs: start fewer processes a host"
        )
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    return Topology(rank, local_rank, world_size, device, min(world_size, _local_size(environment)))


def _local_size(environment: dict[str, str]) -> int:
    """What `torchrun` or `deepspeed` says of this host; 1 where neither does."""
    text = environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or "1"
    return int(text) if text.isdecimal() and int(text) > 0 else 1


def shell_environment() -> dict[str, str]:
    """What this process was given, for `tools.doctor` to explain."""
    return dict(os.environ)


def wandb_mode() -> str | None:
    """The W&B mode that the user asked for in the environment, if any."""
    return os.environ.get("WANDB_MODE")


def choose_accelerator() -> None:
    """DeepSpeed looks for an accelerator once, while it is imported, and warns where it finds none: not after this."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def is_first_of_host() -> bool:
    """By the environment alone, so that it can be asked before the topology is read."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


class MeetingPlace(NamedTuple):
    """Where the ranks find each other."""

    address: str
    port: int
    several_hosts: bool
    agents_restart: str | None
    """How often torchrun's agents, who have met there already and own the port, restarted; None without such agents."""


def meeting_place(topology: Topology) -> MeetingPlace:
    """What the launcher left in the environment about it; only for a launch of several ranks."""
    return MeetingPlace(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        topology.world_size > topology.local_size,
        os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        else None,
    )


def fill_environment(topology: Topology) -> None:
    """Give this process the variables that the launcher left out, and its share of the host's cores."""
    if topology.world_size == 1:
        defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        for name, value in defaults.items():
            os.environ.setdefault(name, value)
    os.environ.setdefault("LOCAL_SIZE", str(topology.local_size))
    if topology.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # Ranks that share a host share its cores; each with a thread a core, they would be several times slower.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // topology.local_size))


def talk_over(interface: str) -> None:
    """Let gloo, whose own choice is often 127.0.0.1, use this network interface unless the user named one."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
