"""A save behind the training writes what one that waits would have written, and what fails behind it is heard."""

import shutil
import threading
from pathlib import Path

import pytest

from engine.checkpoint.folder import newest_good
from engine.checkpoint.manifest import MANIFEST, folder_name, read_manifest
from engine.checkpoint.saving import Saves, save
from engine.checkpoint.snapshot import SavedFiles
from engine.run.folder import describe
from engine.run.memory import rank_need
from tests.engine.programs import BF16, Run, prepare, zero
from tests.engine.test_resume import COMBINED, CONFIGS, TENSOR

NAMES = ("zero1-bf16", "zero3-bf16", "zero2-offload", "zero3-offload", "zero0-muon", "pipeline", "pipeline-bf16")
COMPRESSION = {"method": "powersgd", "rank": 2, "warmup_steps": 0, "min_elements": 500}
ADAPTERS = {"adapters.names": "[long, short]", "adapters.r": "2", "adapters.lora_alpha": "4"}
ON_TWO = {name: CONFIGS[name] for name in ("zero0", "zero1", "zero2", "zero3", *NAMES)} | {
    "compressed": (zero(0, gradient_compression=COMPRESSION), {}),
    "tensor2-zero0": TENSOR["tensor2-zero0"],
    "tensor2-zero3": TENSOR["tensor2-zero3"],
    "adapters-zero2": (zero(2, **BF16), ADAPTERS),
    "adapters-zero3": (zero(3), ADAPTERS),
    "adapters-pipeline": (zero(1, pipeline={"stages": "auto"}), ADAPTERS),
}
ON_FOUR = {name: COMBINED[name] for name in ("pipeline2-tensor2", "tensor2-sequence2-zero3")}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}


class Held:
    """A thread that writes waits here."""

    def __init__(self, monkeypatch):
        self.gate, write = threading.Event(), SavedFiles.write

        def wait_and_write(files):
            assert self.gate.wait(100)
            write(files)

        monkeypatch.setattr(SavedFiles, "write", wait_and_write)


def saved_both_ways(folder: str, recipe: str, data: str, configs: dict) -> dict[str, list]:
    """Per layout and step: what differs between the files of a save and of one whose writing begins a step later."""
    results = {}
    for name, (ds_config, overrides) in configs.items():
        run = Run(recipe, data, ds_config, Path(folder) / name, overrides)
        facts, behind = describe(run.plan), Path(folder) / name / "behind"
        behind.mkdir(exist_ok=True)
        saves, differences = Saves(behind, facts, background=True), []
        run.steps(1)
        for step in (1, 2):
            at_once = save(run.engine, run.folder, run.state, facts)
            with pytest.MonkeyPatch.context() as patch:
                held = Held(patch)
                saves.begin(run.engine, run.state)
                run.steps(1)
                assert not (behind / "checkpoints" / folder_name(step)).exists()
                held.gate.set()
                outcome = saves.wait(run.engine)
            assert outcome.step == step
            assert not outcome.problem, outcome
            later = behind / "checkpoints" / folder_name(step)
            expected, found = content(at_once), content(later)
            differences.append(sorted({n for n in expected | found if expected.get(n) != found.get(n)}))
            told, other = (read_manifest(folder).model_dump(exclude={"created"}) for folder in (later, at_once))
            differences.append({key: (value, told[key]) for key, value in other.items() if told[key] != value})
        copied = sum(buffer.nbytes() for buffer in saves._buffers.values())
        foreseen = rank_need(run.plan, run.topology.rank).snapshot
        assert name in ("compressed", "zero0-muon") or foreseen <= copied <= 1.001 * foreseen
        results[name] = differences
        run.close()
    return results


@pytest.mark.parametrize(("ranks", "configs"), [(2, ON_TWO), (4, ON_FOUR)])
def test_the_files_are_those_of_a_save_that_waits(tmp_path, on_ranks, ranks, configs):
    """The second save copies into the memory of the first."""
    for found in on_ranks(ranks, saved_both_ways, str(tmp_path), *prepare(tmp_path), configs):
        assert found == {name: [[], {}] * 2 for name in configs}


def failing(folder: str, recipe: str, data: str) -> list:
    """Saves of which one rank's writing fails; what all ranks hear."""
    run = Run(recipe, data, zero(2), Path(folder), {})
    heard, rank = [], run.topology.rank
    for background, error in (
        (True, OSError(28, "No space left on device")),
        (False, OSError(28, "No space left on device")),
        (True, PermissionError(13, "Permission denied")),
        (True, RuntimeError("[enforce fail at inline_container.cc] PytorchStreamWriter failed writing file")),
        (True, ZeroDivisionError("a fault of ours")),
    ):
        saves = Saves(Path(folder), describe(run.plan), background)
        run.steps(1)
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:

                def refuse(files, error=error):
                    files.paths[0].parent.mkdir(parents=True, exist_ok=True)  # as a write does before it can fail
                    raise error

                patch.setattr(SavedFiles, "write", refuse)
            saves.begin(run.engine, run.state)
            outcome = saves.wait(run.engine)
        assert (saves.news() is not None) == (rank == 0)
        assert not list((Path(folder) / "checkpoints").glob(".*"))
        heard.append((outcome.problem, outcome.may_pass))
        run.save()
    run.close()
    return heard


def test_what_fails_on_one_rank_all_hear_and_the_next_save_is_whole(tmp_path, on_ranks):
    first, second = on_ranks(2, failing, str(tmp_path), *prepare(tmp_path))
    assert first == second
    words = ["No space left on device"] * 2 + ["Permission denied", "PytorchStreamWriter failed", "a fault of ours"]
    assert [may_pass for _, may_pass in first] == [True, True, False, False, False]
    for step, ((problem, _), reason) in enumerate(zip(first, words, strict=True), start=1):
        assert problem.startswith(f"{tmp_path}/checkpoints: the checkpoint of step {step} could not be written (")
        assert reason in problem
        assert problem.endswith("the earlier ones are as they were" if step > 1 else "there is no earlier one")
    assert newest_good(tmp_path)[1].state.step == 5


def without_room(folder: str, recipe: str, data: str) -> tuple:
    run = Run(recipe, data, zero(2), Path(folder), {})
    run.steps(1)
    saves = Saves(Path(folder), describe(run.plan), background=True)
    with pytest.MonkeyPatch.context() as patch:
        usage = shutil.disk_usage(folder)
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        patch.setattr(Path, "mkdir", None)  # nothing is written
        saves.begin(run.engine, run.state)
        outcome = saves.wait(run.engine)
    run.close()
    return outcome.problem, outcome.may_pass


def test_a_save_that_cannot_have_room_is_not_begun(tmp_path, on_ranks):
    for problem, may_pass in on_ranks(2, without_room, str(tmp_path), *prepare(tmp_path)):
        assert "(No space left on device: it needs 0.001 GB and 0.000 GB are free)" in problem
        assert may_pass
