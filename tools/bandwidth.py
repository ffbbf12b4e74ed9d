"""How fast the hosts of a launch exchange data: one short run with a process a host, started over ssh as the launcher does.

`tools.doctor` starts the processes and reads the figures of the first.
"""

import itertools
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

from console.command import CommandParser, run_command

ROOT = Path(__file__).resolve().parent.parent
MARK = "longform-bandwidth "
"""Begins the line with the figures."""

PATIENCE = timedelta(seconds=60)
MEBIBYTE = 1 << 20
SECONDS_OF_ONE = 0.2
"""What one transfer should take: long enough for a figure, short enough for many hosts."""

MOST_MEBIBYTES = 64
SLOW_SHARE = 0.5
"""Of the fastest pair's rate; below, a pair is noted."""

GIGABIT = 100e6
"""Bytes a second that a network of one gigabit still gives."""


def measure(
    hosts: Sequence[str],
    address: str,
    port: int,
    backend: str,
    forwarded: Mapping[str, str],
    run_on: Callable[..., Any],
) -> dict[str, Any]:
    """Rates in bytes a second: `all_reduce` (of the bus) and `pairs` by `a - b`, the slower direction of each.

    `run_on(host, command, seconds=...)`: gives the CompletedProcess of a command there. Raises ValueError with the last words of
    each host where it fails.
    """
    exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in forwarded.items())
    seconds = 2 * PATIENCE.total_seconds() + 3 * len(hosts)
    with ThreadPoolExecutor(len(hosts)) as pool:
        started = []
        for rank, host in enumerate(hosts):
            flags = {"rank": rank, "world_size": len(hosts), "address": address, "port": port, "backend": backend}
            words = [sys.executable, "-m", "tools.bandwidth", *(f"--{name}={value}" for name, value in flags.items())]
            command = f"cd {shlex.quote(str(ROOT))} && env {exports} {shlex.join(words)}"
            started.append(pool.submit(run_on, host, command, seconds=seconds))
        ended = [each.result() for each in started]
    failed = [(host, done) for host, done in zip(hosts, ended, strict=True) if done.returncode]
    if failed:
        raise ValueError(
            "\n".join(f"{host}: {(done.stderr.strip() or 'no word').splitlines()[-1]}" for host, done in failed)
        )
    (line,) = [line for line in ended[0].stdout.splitlines() if line.startswith(MARK)]
    found = json.loads(line.removeprefix(MARK))
    pairs = {f"{hosts[a]} - {hosts[b]}": rate for a, b, rate in found["pairs"]}
    return {"backend": backend, "all_reduce": found["all_reduce"], "pairs": pairs}


def notes(found: Mapping[str, Any]) -> list[str]:
    """A sentence for each host, or else pair of hosts, that is much slower than the fastest pair, and for a slow network."""
    pairs: dict[str, float] = found["pairs"]
    best = max(pairs.values())
    of_host: dict[str, list[float]] = {}
    for pair, rate in pairs.items():
        for host in pair.split(" - "):
            of_host.setdefault(host, []).append(rate)
    sentences = []
    slow = {host: max(rates) for host, rates in of_host.items() if len(rates) > 1 and max(rates) < SLOW_SHARE * best}
    for host, rate in slow.items():
        sentences.append(
            f"{host}: exchanges {in_words(rate)} at most with the others, who reach {in_words(best)}: look at its link"
        )
    for pair, rate in pairs.items():
        if rate < SLOW_SHARE * best and not set(pair.split(" - ")) & set(slow):
            sentences.append(f"{pair}: {in_words(rate)} between them, where other pairs reach {in_words(best)}")
    if statistics.median(pairs.values()) < GIGABIT:
        sentences.append(
            f"the network gives {in_words(best)} at best, less than one gigabit should: is it the one you mean?"
        )
    return sentences


def in_words(rate: float) -> str:
    """A rate in bytes a second."""
    return f"{rate / 1e6:,.1f} MB/s" if rate < 100e6 else f"{rate / 1e6:,.0f} MB/s"


def rounds(count: int) -> Iterator[list[tuple[int, int]]]:
    """All pairs of so many, in rounds in which everybody is in one pair at most (the circle method)."""
    circle = [*range(count), *([-1] if count % 2 else [])]
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        couples = zip(circle[:half], reversed(circle[half:]), strict=True)
        yield [(min(pair), max(pair)) for pair in couples if min(pair) >= 0]
        circle = [circle[0], circle[-1], *circle[1:-1]]


def run_rank(rank: int, world_size: int, address: str, port: int, backend: str) -> None:
    """What one host does; the first prints the figures."""
    import torch
    import torch.distributed as dist

    from launch.rendezvous import interface_towards
    from launch.topology import talk_over

    if interface := interface_towards(address, port, several_hosts=True):
        talk_over(interface)
    device = torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    place = f"tcp://[{address}]:{port}" if ":" in address else f"tcp://{address}:{port}"
    dist.init_process_group(backend, init_method=place, rank=rank, world_size=world_size, timeout=PATIENCE)

    def seconds_of(act: Callable[[torch.Tensor], Any], data: torch.Tensor) -> float:
        began = time.perf_counter()
        act(data)
        data[0].item()  # waits for the device
        return time.perf_counter() - began

    def rate_of(act: Callable[[torch.Tensor], Any], tell: Callable[[torch.Tensor], Any]) -> float:
        """Bytes a second, of as much as takes long enough; `tell`: gives a number of the one who decides to the others."""
        data = torch.zeros(MEBIBYTE // 4, device=device)
        act(data[:1])  # connects
        more = torch.tensor([int(SECONDS_OF_ONE / seconds_of(act, data))], device=device).clamp(1, MOST_MEBIBYTES)
        tell(more)
        data = data.repeat(int(more.item()))
        return 4 * data.numel() / seconds_of(act, data)

    def send(source: int, target: int) -> float:
        """One direction: data, and a receipt for it."""
        receipt = torch.zeros(1, device=device)

        def act(data: torch.Tensor) -> None:
            if rank == source:
                dist.send(data, target)
                dist.recv(receipt, target)
            else:
                dist.recv(data, source)
                dist.send(receipt, source)
            receipt.item()

        return rate_of(act, lambda more: dist.send(more, target) if rank == source else dist.recv(more, source))

    all_reduce = rate_of(dist.all_reduce, lambda more: dist.broadcast(more, 0))
    rates = []
    for pairs in rounds(world_size):
        dist.barrier()
        for a, b in pairs:
            if rank in (a, b):
                rate = min(send(a, b), send(b, a))
                rates += [(a, b, rate)] if rank == a else []
    everybodys: list[Any] = [None] * world_size
    dist.all_gather_object(everybodys, rates)
    if rank == 0:
        bus = all_reduce * 2 * (world_size - 1) / world_size  # what a ring moves over each link
        print(MARK + json.dumps({"all_reduce": bus, "pairs": sorted(itertools.chain(*everybodys))}), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = CommandParser(prog="python -m tools.bandwidth", description=__doc__)
    parser.add_argument("--rank", type=int, required=True, help="number of this process, of one a host")
    parser.add_argument("--world_size", type=int, required=True, help="how many there are")
    parser.add_argument("--address", required=True, help="of the first host, for the others")
    parser.add_argument("--port", type=int, required=True, help="that is free there")
    parser.add_argument("--backend", choices=["gloo", "nccl"], required=True, help="what carries the data")
    arguments = parser.parse_args()
    run_rank(arguments.rank, arguments.world_size, arguments.address, arguments.port, arguments.backend)


if __name__ == "__main__":
    run_command(main)
