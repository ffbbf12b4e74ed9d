"""Which checkpoints are kept, which go, and what is said of those that somebody else takes away."""

import shutil
from pathlib import Path

import pytest

from engine.checkpoint.manifest import read_manifest, step_of, steps
from engine.checkpoint.retention import Retention, delete_folder
from tests.engine.checkpoint.test_folder import write
from training.config import CheckpointConfig


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        ({"keep_last": 2}, [60, 50]),
        ({"keep_last": 3, "keep_every_steps": 20}, [60, 50, 40, 20]),
        ({"keep_last": 2, "keep_every_steps": 30}, [60, 50, 30]),
        ({"keep_last": 100}, [60, 50, 40, 30, 20, 10]),
    ],
)
def test_retention(tmp_path, policy, kept):
    for step in range(10, 70, 10):
        write(tmp_path, step)
    assert Retention(tmp_path, CheckpointConfig(**policy)).retire(steps(tmp_path)[0]) == []
    assert [int(path.name.removeprefix("step-")) for path in steps(tmp_path)] == kept
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_checkpoints_of_skipped_steps_take_no_healthy_one_s_place(tmp_path):
    for step in (1, 2):
        write(tmp_path, step)
    retention = Retention(tmp_path, CheckpointConfig(keep_last=2))
    for step in (3, 4, 5):
        retention.retire(write(tmp_path, step, skips=step - 2))
    assert [step_of(folder) for folder in steps(tmp_path)] == [5, 2, 1]
    retention.retire(write(tmp_path, 6))
    assert [step_of(folder) for folder in steps(tmp_path)] == [6, 2]


def test_what_cannot_be_deleted_or_was_taken_away_is_said(tmp_path):
    for step in (1, 2, 3):
        write(tmp_path, step)
    first, second, third = reversed(steps(tmp_path))
    retention = Retention(tmp_path, CheckpointConfig(keep_last=2))
    first.with_name(f".{first.name}.partial").touch()  # in the way of the deletion
    (sentence,) = retention.retire(third)
    assert sentence.startswith(f"{first} is no longer needed but cannot be deleted (")
    assert steps(tmp_path) == [third, second, first]
    assert delete_folder(first.with_name(f".{first.name}.partial")) != []
    shutil.rmtree(tmp_path / "checkpoints")  # also the one that the user was told to delete
    (sentence,) = retention.retire(write(tmp_path, 4))
    assert f": {second.name}, {third.name} was removed while training ran" in sentence
    assert retention.retire(write(tmp_path, 5)) == []


@pytest.mark.parametrize("moment", range(6))
def test_a_checkpoint_taken_away_once_it_is_complete_is_said_with_the_others(tmp_path, monkeypatch, moment):
    write(tmp_path, 1)
    retention, newest, calls = Retention(tmp_path, CheckpointConfig(keep_last=2)), write(tmp_path, 2), []

    def stat(path, _real=Path.stat, **options):
        if newest in path.parents:
            calls.append(path)
            if len(calls) == moment + 1:
                shutil.rmtree(tmp_path / "checkpoints")
        return _real(path, **options)

    with monkeypatch.context() as disturbed:
        disturbed.setattr(Path, "stat", stat)
        (sentence,) = retention.retire(newest)
    assert len(calls) > moment
    assert ": step-00000001, step-00000002 was removed while training ran" in sentence
    assert retention.retire(write(tmp_path, 3)) == []


@pytest.mark.parametrize("moment", range(6))
def test_what_was_taken_away_while_older_ones_are_deleted_is_said_once(tmp_path, monkeypatch, moment):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    retention, folders = Retention(tmp_path, CheckpointConfig(keep_last=2)), steps(tmp_path)
    calls = []

    def disturbed(work):
        def call(*args, **options):
            calls.append(work)
            if len(calls) == moment + 1:
                shutil.rmtree(tmp_path / "checkpoints")
            return work(*args, **options)

        return call

    for work in (read_manifest, delete_folder):
        monkeypatch.setattr(f"engine.checkpoint.retention.{work.__name__}", disturbed(work))
    assert retention.retire(folders[0]) == []
    assert len(calls) > moment
    (sentence,) = retention.retire(write(tmp_path, 5))
    assert f"{folders[0].name} was removed while training ran, by something else" in sentence


def test_nothing_is_read_again_while_nothing_goes(tmp_path, monkeypatch):
    for step in (1, 2):
        write(tmp_path, step)
    monkeypatch.setattr("engine.checkpoint.manifest.digest_of_file", lambda path: pytest.fail(f"{path} was read"))
    Retention(tmp_path, CheckpointConfig(keep_last=3)).retire(write(tmp_path, 3))
    assert [step_of(folder) for folder in steps(tmp_path)] == [3, 2, 1]
