"""Who this process is, and how the processes find and leave each other: the only reader of the environment."""

import datetime
import io
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.hostfile import hosts_of_ranks, launcher_commands, refuse_missing_hostfile
from engine.peers import FAILED_COLLECTIVE, LostPeer, RollCall
from engine.rendezvous import interface_towards, listens, wait_for_all_ranks
from engine.safe_load import force_everywhere
from training.signals import EXIT_INTERRUPTED

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
OTHERS_FIRST_SECONDS = 10.0
PRESENT: list[RollCall] = []
"""The roll call of this launch, once the ranks have met: for the last words of this process."""


# DeepSpeed looks for an accelerator once, while it is imported, and warns where it finds none.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


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


def start_process_group(topology: Topology, collective_timeout_minutes: float = 30.0) -> None:
    """Join the other ranks. Must come before anything that communicates, zero.Init included.

    Raises LostPeer when a rank does not come.
    """
    if topology.world_size == 1:
        defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        for name, value in defaults.items():
            os.environ.setdefault(name, value)
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if topology.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # Ranks that share a host share its cores; each with a thread a core, they would be several times slower.
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_SIZE"])))

    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    force_everywhere()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of names DeepSpeed uses
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # an inference collective, compiled at every start
    backend = "gloo" if topology.device.type == "cpu" else "nccl"
    timeout = datetime.timedelta(minutes=collective_timeout_minutes)
    for constant in ("default_pg_timeout", "default_pg_nccl_timeout"):  # of the groups that DeepSpeed makes
        setattr(torch.distributed.distributed_c10d, constant, timeout)
    if topology.world_size > 1:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        several_hosts = topology.world_size > int(os.environ["LOCAL_SIZE"])
        if interface := interface_towards(address, port, several_hosts):  # gloo's own choice is often 127.0.0.1
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's agents have met, and own the port
            if not listens(address, port):
                raise LostPeer(
                    f"torchrun, which keeps the ranks' store at {address}:{port}, has ended or cannot be reached"
                )
            store = torch.distributed.TCPStore(address, port, is_master=False)
            store = torch.distributed.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        else:
            meeting = (topology.rank, topology.world_size, address, port)
            store = wait_for_all_ranks(*meeting, hosts_of_ranks(launcher_commands()))
        roll_call = RollCall(store, topology.rank, topology.world_size, port, lambda: listens(address, port))
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, timeout=timeout, verbose=False)
    if topology.world_size > 1:
        roll_call.read_places()
        PRESENT.append(roll_call)


def run_command(main: Callable[[], int]) -> None:
    """Run a rank's main function and end the process with its code; a ValueError becomes sentences and code 2.

    After an error the process does not wait for its peers, who may be waiting for it: the launcher ends them. Where
    another rank is the reason, the code is 1 and the sentence names that rank.
    """
    outlive_readers()
    try:
        leave(main())
    except (ValueError, OSError) as error:
        say_farewell(f"ended: {str(error).splitlines()[0]}")
        if os.environ.get("LOCAL_RANK", "0") != "0" and isinstance(error, ValueError):
            # The first rank of this host is about to say the same; the launcher then ends this one.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(OTHERS_FIRST_SECONDS)
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        leave(2, wait=False)
    except KeyboardInterrupt:
        print("interrupted: the same command continues from the newest checkpoint", file=sys.stderr)
        leave(EXIT_INTERRUPTED, wait=False)
    except LostPeer as error:
        print(f"error: {error}", file=sys.stderr)
        leave(1, wait=False)
    except Exception as error:
        if lost := FAILED_COLLECTIVE.search(str(error)):
            sentence = f"another rank ended or cannot be reached ({lost[0]}): see its messages"
            print(f"error: {PRESENT[0].explain(str(error)) if PRESENT else sentence}", file=sys.stderr)
        else:
            traceback.print_exc()
            say_farewell(f"ended: {traceback.format_exception_only(error)[-1].strip()}")
        leave(1, wait=False)


class Output(io.FileIO):
    """Standard output or error; a terminal, pipe or disk that no longer takes it ends no run."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def outlive_readers() -> None:
    """Let what is printed be lost once nobody can take it, instead of raising in the middle of a step or a save."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        if (stream := getattr(sys, name)) is not None:  # closed from the beginning: nothing is printed
            buffer = io.BufferedWriter(Output(number, "w", closefd=False))
            encoding = {"encoding": stream.encoding, "errors": stream.errors}
            setattr(sys, name, io.TextIOWrapper(buffer, line_buffering=True, **encoding))


def say_farewell(text: str) -> None:
    """Let the other ranks read why this one ends."""
    for roll_call in PRESENT:
        roll_call.say(text)


def leave(code: int, wait: bool = True) -> None:
    """End this process with `code`, after all ranks have arrived if `wait`; never returns.

    Interpreter shutdown with live gloo threads can abort, so the process leaves without it once everything is flushed.
    """
    if wait and torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
