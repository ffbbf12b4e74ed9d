"""What a run needs of its hosts, said before it starts."""

import argparse

import pytest
import yaml

from engine.run.memory import checkpoint_bytes
from engine.run.plan import make_plan
from launch.topology import read_topology
from tests.engine.programs import RECIPE, prepare
from tests.processes import ROOT
from tools.foreseen_needs import Room, disk_needed, foresee

LARGE = Room(ranks=1, free_memory=1 << 40, device_memory=0)


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    """Arguments as `train.py` has them, of a run of 100 steps with a checkpoint every 10."""
    folder = tmp_path_factory.mktemp("needs")
    prepare(folder)
    changes = {"training": RECIPE["training"] | {"max_steps": 100}, "checkpoint": {"every_steps": 10, "keep_last": 2}}
    (folder / "changed.yaml").write_text(yaml.safe_dump(RECIPE | changes))

    def arguments(ds_config: str = "zero2_fp32", output: str | None = None) -> argparse.Namespace:
        return argparse.Namespace(
            recipe=str(folder / "changed.yaml"),
            deepspeed_config=str(ROOT / "ds_configs" / f"{ds_config}.json"),
            data=str(folder / "data"),
            output=output,
            pipeline=None,
            tensor=None,
            sequence=None,
        )

    return arguments


@pytest.mark.parametrize("ds_config", ["zero0_fp32", "zero2_fp32", "zero3_fp32", "zero2"])
def test_checkpoints_and_the_disk_for_them(problem, tmp_path, ds_config):
    """Twelve bytes a parameter, as `test_nothing_is_written_twice` finds them in the files."""
    given = problem(ds_config)
    plan = make_plan(given.recipe, {}, given.deepspeed_config, given.data, read_topology({}))
    each = checkpoint_bytes(plan)
    assert each == 12 * plan.recipe.model.num_parameters()
    assert disk_needed(plan, tmp_path) == 3 * each  # two kept and one being written
    policy = plan.recipe.checkpoint
    for changes, count in (
        ({"keep_every_steps": 50}, 4),  # step 50 beside them; 100 is the last
        ({"keep_last": 30}, 10),
        ({"every_steps": 60}, 2),
        ({"every_steps": 200}, 1),
    ):
        recipe = plan.recipe.model_copy(update={"checkpoint": policy.model_copy(update=changes)})
        assert disk_needed(plan._replace(recipe=recipe), tmp_path) == count * each
    there = tmp_path / "checkpoints" / "step-00000010"
    there.mkdir(parents=True)
    (there / "file").write_bytes(b"x" * 1000)
    assert disk_needed(plan, tmp_path) == 3 * each - 1000


def test_a_host_without_memory_and_a_disk_without_room_are_problems(problem, tmp_path, monkeypatch):
    monkeypatch.setattr("tools.foreseen_needs.free_disk", lambda folder: 1000)
    needs = foresee(problem(output=str(tmp_path / "run")), {"a": LARGE, "b": LARGE._replace(free_memory=1000)})
    memory, disk = needs.problems
    copied = ", 0.00 GiB of it for what saves in the background copy,"
    assert memory.startswith(f"b: this rank needs at least 0.00 GiB of host memory{copied} and 0.00 GiB are free")
    assert f"each need 0.00 GB more in {tmp_path}/run and 0.00 GB are free: make room" in disk
    assert needs.facts["ranks"] == 2
    unknown = foresee(problem(), {"a": LARGE._replace(free_memory=None)})
    assert unknown.problems == []


def test_an_illegal_layout_is_a_problem(problem):
    needs = foresee(problem(), {"a": LARGE, "b": LARGE, "c": LARGE})
    assert len(needs.problems) == 1
    assert "on 3 data-parallel ranks" in needs.problems[0]
    assert needs.lines == []
