"""`training.activation_checkpointing: auto`: a number that all ranks have, with which it fits where one less does not."""

import json
import re
from pathlib import Path

import pytest
import torch

from engine.layout.pipeline import recomputed_blocks
from engine.run.folder import describe
from engine.run.plan import RunPlan, make_plan
from engine.run.resume import check_resumable
from launch.topology import Topology, read_topology
from planner import recompute
from planner.activations import Trials
from planner.memory import largest
from planner.recompute import start_decided
from planner.search import SHARE_FOR_LIBRARIES
from tests.engine.programs import Run, prepare, zero
from tests.ranks import run_ranks

RANKS = 2
AUTO = {"training.activation_checkpointing": "auto"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("auto"))


def plan_of(files: tuple[str, str], folder: Path, topology: Topology) -> RunPlan:
    file = folder / f"ds-{topology.rank}.json"
    file.write_text(json.dumps(zero(1)))
    return make_plan(files[0], AUTO, str(file), files[1], topology)


def room_for(plan: RunPlan, blocks: int) -> int:
    """Bytes of a host whose ranks can recompute so many blocks and no fewer."""
    peaks = [largest(plan, "cpu", number, Trials()).peak for number in (blocks - 1, blocks)]
    assert peaks[1] < peaks[0]
    return int(sum(peaks) / 2 / (1 - SHARE_FOR_LIBRARIES) * plan.mesh.world_size)


def started(folder: str, files: tuple[str, str], room: int) -> tuple[int, list[str]]:
    topology = read_topology()
    if topology.is_first:  # the others have as much as there is
        recompute.free_memory_bytes = lambda device: room
    plan = start_decided(plan_of(files, Path(folder), topology), topology)
    run = Run(
        *files,
        zero(1),
        Path(folder),
        {"training.activation_checkpointing": str(recomputed_blocks(plan.recipe))},
    )
    run.steps(1)
    run.save()
    again = plan_of(files, Path(folder), topology)
    return describe(plan)["recipe"]["training"]["activation_checkpointing"], check_resumable(Path(folder), again, False)


def test_all_ranks_recompute_what_the_first_needs_and_a_resume_decides_anew(files, tmp_path):
    plan = plan_of(files, tmp_path, Topology(0, 0, RANKS, torch.device("cpu"), RANKS))
    found = run_ranks(started, RANKS, str(tmp_path), files, room_for(plan, 3))
    assert found == [(3, [])] * RANKS


def test_what_is_decided_is_said_and_what_cannot_be_too(files, tmp_path, capsys, monkeypatch):
    topology = Topology(0, 0, RANKS, torch.device("cpu"), RANKS)
    plan = plan_of(files, tmp_path, topology)
    for room, blocks in ((2**40, 0), (room_for(plan, 1), 1), (2**20, None)):
        monkeypatch.setattr(recompute, "free_memory_bytes", lambda device, room=room: room)
        found = recompute._decide(plan, topology)
        said = capsys.readouterr().out
        if blocks is None:
            assert re.search(r"^training.activation_checkpointing auto: .* GiB.*: take fewer rows", found)
            assert not said
        else:
            assert found == blocks
            assert said.startswith(f"activation checkpointing: {blocks} of 4 blocks are recomputed")
