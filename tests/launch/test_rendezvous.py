"""Ranks meet, or say who is missing and end."""

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest

from launch import rendezvous
from launch.peers import LostPeer
from tests.processes import free_port
from tests.ranks import RankError, run_ranks

HOSTS = ["node1", "node2", "node2", "node3"]


def run_meeting(delays: list[float]) -> tuple[float, float]:
    """Meet after this rank's delay, then make a process group on the same port; returns when it came and met."""
    import torch.distributed as dist

    rendezvous.SILENCE = timedelta(seconds=0.5)
    rank, port = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])
    time.sleep(delays[rank])
    came = time.time()
    store = rendezvous.wait_for_all_ranks(rank, len(delays), "127.0.0.1", port, HOSTS)
    met = time.time()
    dist.init_process_group("gloo")
    del store
    return came, met


def run_absence(folder: str, present: int, arrival_seconds: float) -> str:
    """Only ranks below `present` of four come; returns the sentence with which a rank gives up."""
    rendezvous.ARRIVAL, rendezvous.SILENCE = timedelta(seconds=arrival_seconds), timedelta(seconds=0.5)
    rank, port = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])
    if rank >= present:
        return ""
    Path(folder, str(rank)).touch()
    while len(list(Path(folder).iterdir())) < present:  # imports take their time on a busy machine
        time.sleep(0.02)
    with pytest.raises(LostPeer) as raised:
        rendezvous.wait_for_all_ranks(rank, 4, "127.0.0.1", port, HOSTS)
    return str(raised.value)


def run_first_rank_ends() -> str:
    rank, port = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])
    if rank == 0:
        store = rendezvous.dist.TCPStore("127.0.0.1", port, 3, True, wait_for_workers=False, multi_tenant=True)
        while not store.check(["longform/1"]):
            time.sleep(0.05)
        os._exit(0)
    with pytest.raises(LostPeer) as raised:
        rendezvous.wait_for_all_ranks(rank, 3, "127.0.0.1", port, HOSTS)
    raise KeyError(str(raised.value))


def run_refusal(refusing: list[int]) -> tuple[float, str]:
    """Some ranks of three refuse, a second after the others have come; returns how long it took, and what a rank learns."""
    rank, port = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])
    began = time.monotonic()
    if rank in refusing:
        time.sleep(1)
        rendezvous.refuse(rank, range(rank, rank + 1), 3, "127.0.0.1", port, HOSTS, "no data here")
        return time.monotonic() - began, ""
    with pytest.raises(LostPeer) as raised:
        rendezvous.wait_for_all_ranks(rank, 3, "127.0.0.1", port, HOSTS)
    return time.monotonic() - began, str(raised.value)


def run_after_torchrun() -> str:
    from engine.process_group import start_process_group
    from launch.topology import read_topology

    with pytest.raises(LostPeer) as raised:
        start_process_group(read_topology())
    return str(raised.value)


def test_ranks_whose_torchrun_has_ended_do_not_wait_for_its_store():
    (sentence,) = run_ranks(run_after_torchrun, 1, env={"WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert sentence.startswith("torchrun, which keeps the ranks' store at 127.0.0.1:")


@pytest.mark.parametrize("late", [0, 2])
def test_ranks_wait_for_the_last_one(late):
    delays = [0.0, 0.0, 0.0]
    delays[late] = 2.0
    came, met = zip(*run_ranks(run_meeting, 3, delays), strict=True)
    assert max(came) <= min(met)


def test_absent_ranks_are_named_with_their_hosts(tmp_path):
    first, *others = run_ranks(run_absence, 3, str(tmp_path), 2, 4.0)
    assert first.startswith("node2 (rank 2), node3 (rank 3) did not arrive within 4 s: see its messages")
    assert others[0].startswith("node1 (rank 0) ")  # ended, or did not arrive: whichever is seen first


def test_ranks_do_not_outwait_the_first():
    with pytest.raises(RankError, match=r"node1 \(rank 0\) ended while node2 \(rank 1\) waited for the others"):
        run_ranks(run_first_rank_ends, 2, timeout=60)


@pytest.mark.parametrize("refusing", [[0], [2], [0, 1], [0, 1, 2]])
def test_who_refuses_is_named_at_once(refusing):
    found = run_ranks(run_refusal, 3, refusing)
    assert max(seconds for seconds, _ in found) < rendezvous.FAREWELL.total_seconds()
    for rank, (_, sentence) in enumerate(found):
        if rank not in refusing:
            names = [f"{HOSTS[each]} (rank {each}) ended before the ranks had met: no data here" for each in refusing]
            assert sentence in names


def test_a_port_in_use_is_said():
    import socket

    port = free_port()
    with socket.create_server(("", port)), pytest.raises(ValueError, match=f"port {port} of rank 0 is in use"):
        rendezvous.wait_for_all_ranks(0, 2, "127.0.0.1", port, [])


def test_the_interface_is_the_one_that_leads_there():
    assert rendezvous.interface_towards("127.0.0.1", 1, several_hosts=False) == "lo"
    assert rendezvous.interface_towards("127.0.0.1", 1, several_hosts=True) is None
    assert rendezvous.interface_towards("no.such.host.invalid", 1, several_hosts=True) is None
