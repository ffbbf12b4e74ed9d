"""A rank that ends or hangs is named by the others, who end with 1: not bad input, and no traceback."""

import os
import signal
from pathlib import Path

import pytest

from engine.process_group import start_process_group
from launch.rank import run_rank
from launch.topology import read_topology
from tests.engine.programs import Run, prepare, zero
from tests.ranks import RankError, run_ranks

PIPELINE = zero(1, pipeline={"stages": 2})
LAYOUTS = {"zero2": zero(2, zero={"overlap_comm": True}), "zero3": zero(3), "pipeline": PIPELINE}


def run_beside(layout: str, victim: int, end: str, folder: str, recipe: str, data: str) -> None:
    topology = read_topology()

    def main() -> int:
        start_process_group(topology, 0.2 if end == "SIGSTOP" else 0.4)  # minutes: that one waits them out
        training = Run(recipe, data, LAYOUTS[layout], Path(folder))
        training.steps(1)
        if topology.rank == victim:
            if end == "error":
                raise KeyError("the reason is here")
            os.kill(os.getpid(), getattr(signal, end))
        training.steps(2)
        return 0

    run_rank(main)


@pytest.mark.parametrize(
    ("layout", "victim", "end", "sentence"),
    [
        ("zero2", 1, "SIGKILL", "(rank 1) was killed, for memory perhaps: it said nothing and its process is gone"),
        ("pipeline", 1, "SIGSTOP", "(rank 1) is stopped (SIGSTOP): its process does not run"),
        ("pipeline", 0, "SIGKILL", "(rank 0) ended or cannot be reached: see its messages"),
        ("zero3", 0, "error", "(rank 0) ended: KeyError: 'the reason is here'"),
    ],
)
def test_the_others_name_it(layout, victim, end, sentence, tmp_path):
    folders = (str(tmp_path / "run"), *prepare(tmp_path))
    with pytest.raises(RankError) as raised:
        run_ranks(run_beside, 2, layout, victim, end, *folders, timeout=200, until_all_end=end != "SIGSTOP")
    said = str(raised.value)
    assert f"rank {1 - victim}: exit code 1" in said, said
    (line,) = [line for line in said.splitlines() if line.startswith("error: a collective")]
    assert sentence in line
    assert ("timed out" in line) == (end == "SIGSTOP")
    assert said.count("Traceback") == (end == "error"), said
