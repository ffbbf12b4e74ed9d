"""How a rank meets the others, and how it ends: what it says, when, and with which exit code."""

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

import torch

from console.output import outlive_readers
from launch.hostfile import hosts_of_ranks, launcher_commands
from launch.peers import FAILED_COLLECTIVE, LostPeer, RollCall
from launch.rendezvous import interface_towards, listens, refuse, wait_for_all_ranks
from launch.signals import EXIT_INTERRUPTED
from launch.topology import Topology, is_first_of_host, meeting_place, read_topology, talk_over

OTHERS_FIRST_SECONDS = 10.0
PRESENT: list[RollCall] = []
"""The roll call of this launch, once the ranks have met: for the last words of this process."""


def meet(topology: Topology) -> RollCall:
    """Wait for the other ranks of a launch of several. Raises LostPeer when one does not come."""
    place = meeting_place(topology)
    address, port = place.address, place.port
    if interface := interface_towards(address, port, place.several_hosts):
        talk_over(interface)
    if place.agents_restart is not None:
        if not listens(address, port):
            raise LostPeer(
                f"torchrun, which keeps the ranks' store at {address}:{port}, has ended or cannot be reached"
            )
        of_agents = torch.distributed.TCPStore(address, port, is_master=False)
        store: torch.distributed.Store = torch.distributed.PrefixStore(place.agents_restart, of_agents)
    else:
        hosts = hosts_of_ranks(launcher_commands())
        store = wait_for_all_ranks(topology.rank, topology.world_size, address, port, hosts)
    return RollCall(store, topology.rank, topology.world_size, port, lambda: listens(address, port))


def run_rank(main: Callable[[], int]) -> None:
    """Run a rank's main function and end the process with its code; a ValueError becomes sentences and code 2.

    After an error the process does not wait for its peers, who may be waiting for it: the launcher ends them. Where
    another rank is the reason, the code is 1 and the sentence names that rank.
    """
    outlive_readers()
    try:
        leave(main())
    except (ValueError, OSError) as error:
        say_farewell(f"ended: {str(error).splitlines()[0]}")
        if not is_first_of_host() and isinstance(error, ValueError):
            # The first rank of this host is about to say the same; the launcher then ends this one.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(OTHERS_FIRST_SECONDS)
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.stderr.flush()
        refuse_to_meet(str(error).splitlines()[0])
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
            leave(PRESENT[0].exit_code if PRESENT else 1, wait=False)
        else:
            traceback.print_exc()
            reason = traceback.format_exception_only(error)[-1].strip()
            say_farewell(f"ended: {reason}")
            refuse_to_meet(reason)
        leave(1, wait=False)


def refuse_to_meet(reason: str) -> None:
    """Where the ranks of other hosts are waiting for this one, or will be: tell them that it ends, and why."""
    with contextlib.suppress(ValueError):  # of an environment that no launcher has made
        topology = read_topology()
        if PRESENT or topology.local_size == topology.world_size:
            return
        place = meeting_place(topology)
        if place.agents_restart is None:  # torchrun's agents end one another's ranks
            first = topology.rank - topology.local_rank
            beside, hosts = range(first, first + topology.local_size), hosts_of_ranks(launcher_commands())
            refuse(topology.rank, beside, topology.world_size, place.address, place.port, hosts, reason)


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
