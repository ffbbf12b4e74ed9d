"""A rank that ends or hangs is named by the others, who end with 1: not bad input, and no traceback."""

import os
import signal

import pytest
import torch
import torch.distributed as dist

from engine.topology import read_topology, run_command, start_process_group
from tests.launch import RankError, run_ranks


def run_beside(victim: int, end: str) -> None:
    topology = read_topology()

    def main() -> int:
        start_process_group(topology, 0.1)
        group = dist.new_group()  # as DeepSpeed makes them, which have a timeout of their own
        dist.all_reduce(torch.zeros(1), group=group)
        if topology.rank == victim:
            if end == "error":
                raise KeyError("the reason is here")
            os.kill(os.getpid(), getattr(signal, end))
        dist.all_reduce(torch.zeros(1), group=group)
        return 0

    run_command(main)


@pytest.mark.parametrize(
    ("victim", "end", "sentence"),
    [
        (1, "SIGKILL", "(rank 1) was killed, for memory perhaps: it said nothing and its process is gone"),
        (1, "SIGSTOP", "(rank 1) is stopped (SIGSTOP): its process does not run"),
        (0, "error", "(rank 0) ended: KeyError: 'the reason is here'"),
    ],
)
def test_the_others_name_it(victim, end, sentence):
    with pytest.raises(RankError) as raised:
        run_ranks(run_beside, 2, victim, end, timeout=200, until_all_end=end != "SIGSTOP")
    said = str(raised.value)
    assert f"rank {1 - victim}: exit code 1" in said, said
    (line,) = [line for line in said.splitlines() if line.startswith("error: a collective")]
    assert sentence in line
    assert ("timed out" in line) == (end == "SIGSTOP")
    assert said.count("Traceback") == (end == "error"), said
