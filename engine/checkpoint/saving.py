"""Checkpoints that prove themselves: `RUN/checkpoints/step-00001000/` is DeepSpeed's files and our manifest.

1. All ranks take what DeepSpeed would write: `engine.checkpoint.snapshot`. In the background, training then goes on.
2. Each writes its files into a hidden folder `.step-00001000.partial`, flushes them to disk, hashes them and tells the
   others so, from a background over a process group of its own, which collectives of the training do not touch.
3. The first rank writes `manifest.json` last, renames the folder, lets go of checkpoints that are no longer kept, and
   tells all ranks how it went.

Only a `step-*` folder whose manifest matches every byte counts as a checkpoint, so whatever is interrupted, the newest good
one is found. A rank that is lost ends the wait of the others like any collective.
"""

import datetime
import errno
import os
import re
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from engine import internals
from engine.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    Files,
    StateLayout,
    digest_of_file,
    folder_name,
    seal,
    steps,
)
from engine.checkpoint.snapshot import Buffers, SavedFiles
from engine.engine import Engine
from engine.layout.names import named_parameters
from storage.atomic import publish, write_atomically
from training.state import TrainState

DISK_FAULT = re.compile("enforce fail|iostream|PytorchStreamWriter|write failed|No space left|Parent directory")
"""Of the RuntimeErrors by which `torch.save` says that the file system refused."""
PASSING = (errno.ENOSPC, errno.EDQUOT, errno.ENOENT)
"""No room, or somebody has removed the folder meanwhile: the next save may succeed."""
SLOWEST = datetime.timedelta(days=1)
"""For which a rank that has written waits for others."""
LOOK_SECONDS = 0.02
OTHERS_SECONDS = 5.0
"""For how long the first rank, ending with an error, waits for what other ranks may still write."""


class Outcome(NamedTuple):
    """How a save went."""

    step: int
    stall_seconds: float
    """For which the training of the first rank stood still; where nothing is left to the background, without the wait."""
    seconds: float
    """From its beginning to its end."""
    problem: str = ""
    """Why there is no checkpoint; empty where there is one."""
    may_pass: bool = False
    """Whether the next save may succeed all the same: room was missing, or the folder."""
    notices: Sequence[str] = ()


def layout_of(engine: Engine) -> StateLayout:
    return StateLayout(
        zero_stage=engine.zero_stage,
        world_size=dist.get_world_size(),
        wrapper=type(engine.optimizer).__name__,
        optimizer=type(engine.base_optimizer).__name__,
        stage_bounds=engine.pipeline_bounds,
        tensor=engine.mesh.tensor,
    )


def _parameter_order(engine: Engine) -> list[str]:
    if engine.zero_stage > 0:
        return []
    names = {id(parameter): name for name, parameter in named_parameters(engine.module)}
    return [names[id(p)] for group in engine.base_optimizer.param_groups for p in group["params"] if id(p) in names]


class Saves:
    """The checkpoints that a run writes, one at a time. Collective over all ranks to make.

    `facts`: recipe, ds_config, environment and data, as the manifest's fields. `retire`: what the first rank does when the
    checkpoint in this folder is complete; it returns sentences.
    """

    def __init__(
        self,
        run: Path,
        facts: dict[str, Any],
        background: bool = False,
        retire: Callable[[Path], Sequence[str]] = lambda _: (),
    ) -> None:
        self._run, self._facts, self._retire = run, facts, retire
        self._buffers: Buffers | None = {} if background else None
        self._group = dist.new_group(backend="gloo", timeout=SLOWEST) if background else dist.group.WORLD
        self._rank = dist.get_rank()
        self._written = threading.Event()
        self._writing: threading.Thread | None = None
        self._news: Outcome | None = None
        self._last: Outcome | None = None
        self._lost: RuntimeError | None = None

    def begin(self, engine: Engine, state: TrainState) -> None:
        """Take what is to be written; the files are written already where that is not left to the background.

        Collective over all ranks. No other save may be in flight: see `wait`.
        """
        assert self._writing is None
        began = time.perf_counter()
        partial = self._run / "checkpoints" / f".{folder_name(state.step)}.partial"
        if self._rank == 0:  # before DeepSpeed's first barrier, after which files may be written
            shutil.rmtree(partial, ignore_errors=True)
        files = SavedFiles(self._buffers)
        with internals.saving_through(engine.deepspeed, files):
            client_state = {"longform": state.model_dump()}
            options: dict[str, Any] = {"save_latest": False, "exclude_frozen_parameters": True}
            engine.deepspeed.save_checkpoint(str(partial.parent), partial.name, client_state, **options)
        if engine.reduction:
            name, content = engine.reduction.file()
            files.save(content, partial / name)
        place: dict[str, Any] = {"layout": layout_of(engine), "parameters": _parameter_order(engine)}
        place |= {"base": engine.base, "state": state.model_copy(deep=True)}
        if engine.prior:
            place["prior"] = engine.prior.state
        self._written.clear()
        task = _Task(files, partial, place, began, time.perf_counter() - began)
        if self._buffers is None:
            self._finish(task)
        else:
            self._writing = threading.Thread(target=self._finish_behind, args=(task,), daemon=True)
            self._writing.start()

    def wait(self, engine: Engine) -> Outcome | None:
        """For the save in flight: how the last one went; None before the first. Collective over all ranks."""
        if self._writing:
            while engine.sum_over_ranks([float(self._writing.is_alive())])[0]:
                time.sleep(LOOK_SECONDS)
            self._writing = None
        if self._lost:
            raise self._lost
        return self._last

    def news(self) -> Outcome | None:
        """On the first rank, once for each save that has come to its end: how it went."""
        news, self._news = self._news, None
        return news

    def leave(self) -> None:
        """Let what this rank writes come to its end, and the checkpoint too if the others do their part in time."""
        if self._writing:
            self._written.wait()
            self._writing.join(OTHERS_SECONDS)

    def _free(self) -> float:
        usage = shutil.disk_usage(self._run)
        return usage.free if usage.total else float("inf")  # some file systems do not know

    def _finish_behind(self, task: "_Task") -> None:
        try:
            self._finish(task)
        except RuntimeError as error:  # of the other ranks: the training's own collectives fail too
            self._lost = error

    def _finish(self, task: "_Task") -> None:
        """All that follows the snapshot."""
        if self._buffers is not None:
            room = torch.tensor([task.files.bytes, self._free() if self._rank == 0 else 0.0], dtype=torch.float64)
            dist.all_reduce(room, group=self._group)
            task.files.check_room(*room.tolist())
        parts: list[Any] = [None] * dist.get_world_size()
        mine = self._attempt(task, lambda: self._write(task))
        self._written.set()
        dist.all_gather_object(parts, mine, group=self._group)
        results: list[Any] = [None]
        if self._rank == 0:
            result = next((part for part in parts if "problem" in part), None)
            result = result or self._attempt(task, lambda: self._publish(task, parts))
            if "problem" in result:
                shutil.rmtree(task.partial, ignore_errors=True)
            results = [Outcome(task.step, task.stall_seconds, time.perf_counter() - task.began, **result)]
        dist.broadcast_object_list(results, src=0, group=self._group)
        self._last = results[0]
        self._news = self._last if self._rank == 0 else None

    def _write(self, task: "_Task") -> dict[str, Any]:
        task.files.write()
        return {"files": {path.name: _sync_and_hash(path) for path in task.files.paths}}

    def _publish(self, task: "_Task", parts: list[dict[str, Any]]) -> dict[str, Any]:
        files: Files = {name: tuple(entry) for part in parts for name, entry in part["files"].items()}
        found = {str(path.relative_to(task.partial)): path for path in task.partial.rglob("*") if path.is_file()}
        files |= {name: _sync_and_hash(path) for name, path in found.items() if name not in files}
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        manifest = CheckpointManifest(**task.place, files=dict(sorted(files.items())), created=now, **self._facts)
        write_atomically(task.partial / MANIFEST, seal(manifest))
        final = task.partial.with_name(folder_name(task.step))
        shutil.rmtree(final, ignore_errors=True)
        publish(task.partial, final)
        return {"notices": list(self._retire(final))}

    def _attempt(self, task: "_Task", work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the work returns, or why it cannot be done."""
        try:
            return work()
        except Exception as error:
            reason, number = (str(error).strip() or type(error).__name__).splitlines()[0], None
            if isinstance(error, OSError):
                reason, number = error.strerror or reason, error.errno
            elif not isinstance(error, RuntimeError) or not DISK_FAULT.search(str(error)):
                traceback.print_exc()
            elif not task.partial.exists():
                reason, number = os.strerror(errno.ENOENT), errno.ENOENT
            elif self._free() < 1 << 20:
                reason, number = os.strerror(errno.ENOSPC), errno.ENOSPC
            earlier = "the earlier ones are as they were" if steps(self._run) else "there is no earlier one"
            place = f"{self._run / 'checkpoints'}: the checkpoint of step {task.step}"
            return {
                "problem": f"{place} could not be written ({reason}); {earlier}",
                "may_pass": number in PASSING,
            }


class _Task(NamedTuple):
    """A save whose snapshot is taken."""

    files: SavedFiles
    partial: Path
    place: dict[str, Any]
    """Fields of the manifest."""
    began: float
    stall_seconds: float

    @property
    def step(self) -> int:
        return self.place["state"].step


def save(engine: Engine, run: Path, state: TrainState, facts: dict[str, Any]) -> Path:
    """Write the checkpoint of this step and return its folder. Collective over all ranks.

    `facts`: as of `Saves`. Raises ValueError on all ranks where the file system of one refuses.
    """
    run.mkdir(parents=True, exist_ok=True)
    saves = Saves(run, facts)
    saves.begin(engine, state)
    outcome = saves.wait(engine)
    if outcome and outcome.problem:
        raise ValueError(outcome.problem)
    return run / "checkpoints" / folder_name(state.step)


def _sync_and_hash(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path.stat().st_size, digest_of_file(path)
