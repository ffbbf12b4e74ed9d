"""Checkpoints that prove themselves: `RUN/checkpoints/step-00001000/` is DeepSpeed's files and our manifest.

1. All ranks write DeepSpeed's files into a hidden folder `.step-00001000.partial`.
2. Every file is flushed to disk and hashed, each rank taking its share; the first rank writes `manifest.json` last.
3. The folder is renamed. Only a `step-*` folder whose manifest matches every byte counts as a checkpoint, so whatever
   is interrupted, the newest good one is found and a damaged one is skipped with a warning.
"""

import datetime
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from engine.names import named_parameters
from engine.peers import FAILED_COLLECTIVE
from training.config import CheckpointConfig
from training.manifest import publish, write_atomically
from training.state import TrainState

MANIFEST = "manifest.json"


class Layout(BaseModel):
    """What a native load needs to find equal: how the states of this checkpoint are cut over its files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    zero_stage: int
    world_size: int
    wrapper: str
    """DeepSpeed's optimizer class around the base optimizer."""
    optimizer: str
    stage_bounds: tuple[int, ...] = ()
    """Where the layer plan is cut into pipeline stages; empty without a pipeline."""
    tensor: int = 1
    """Ranks over which the matrices of every layer are split."""

    @property
    def parts(self) -> int:
        """Ranks that hold different parameters: pipeline stages times tensor-parallel ranks."""
        return max(len(self.stage_bounds) - 1, 1) * self.tensor

    def __str__(self) -> str:
        words = [f"ZeRO-{self.zero_stage} on {self.world_size} rank{'s' if self.world_size > 1 else ''}"]
        words += [f"{len(self.stage_bounds) - 1} pipeline stages"] if self.stage_bounds else []
        words += [f"tensor parallel {self.tensor}"] if self.tensor > 1 else []
        return ", ".join(words)


class CheckpointManifest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format_version: int = 1
    layout: Layout
    parameters: list[str] = []
    """Names in the order of the optimizer's state, where DeepSpeed's files do not say it (stage 0)."""
    state: TrainState
    recipe: dict[str, Any]
    ds_config: dict[str, Any]
    environment: dict[str, Any]
    data: dict[str, Any]
    """Path, fingerprint, sequence length and tokenizer of the training data; under `stages` those of every stage."""
    files: dict[str, tuple[int, str]]
    """Name in the folder: size in bytes and xxh3-128 digest."""
    created: str


def layout_of(engine) -> Layout:
    """The layout of a live DeepSpeed engine."""
    return Layout(
        zero_stage=int(engine.zero_optimization_stage()),
        world_size=dist.get_world_size(),
        wrapper=type(engine.optimizer).__name__,
        optimizer=type(engine.basic_optimizer).__name__,
        stage_bounds=tuple(getattr(engine.module, "bounds", ())),
        tensor=engine.mesh.tensor,
    )


def _parameter_order(engine) -> list[str]:
    if engine.zero_optimization_stage() > 0:
        return []
    names = {id(parameter): name for name, parameter in named_parameters(engine.module)}
    return [names[id(p)] for group in engine.basic_optimizer.param_groups for p in group["params"] if id(p) in names]


def save(engine, run: Path, state: TrainState, facts: dict[str, Any], policy: CheckpointConfig) -> Path:
    """Write the checkpoint of this step and delete what the policy no longer keeps. Collective over all ranks.

    `facts`: recipe, ds_config, environment and data, as the manifest's fields. Raises ValueError on the rank on which
    the file system refuses (a full disk, say); no `step-*` folder appears then, and the older ones are untouched.
    """
    try:
        return _save(engine, run, state, facts, policy)
    except (OSError, RuntimeError) as error:
        if FAILED_COLLECTIVE.search(str(error)):
            raise  # another rank is the reason, not the disk
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{run / 'checkpoints'}: the checkpoint of step {state.step} could not be written ({reason}); earlier ones are "
            "intact: make room or mend the file system and run the same command again"
        ) from None


def _save(engine, run: Path, state: TrainState, facts: dict[str, Any], policy: CheckpointConfig) -> Path:
    root = run / "checkpoints"
    final = root / f"step-{state.step:08d}"
    partial = root / f".{final.name}.partial"
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    client_state = {"longform": state.model_dump()}
    engine.save_checkpoint(str(root), tag=partial.name, client_state=client_state, save_latest=False)
    if engine.gradient_compression:
        engine.gradient_compression.save(partial)
    files = _sync_and_hash(partial)
    if first:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        place = {"layout": layout_of(engine), "parameters": _parameter_order(engine)}
        manifest = CheckpointManifest(**place, state=state, files=files, created=now, **facts)
        write_atomically(partial / MANIFEST, manifest.model_dump_json(indent=1).encode())
        shutil.rmtree(final, ignore_errors=True)
        publish(partial, final)
        _retire(root, policy)
    dist.barrier()
    return final


def steps(run: Path) -> list[Path]:
    """The `step-*` folders of a run, newest first, good or not."""
    return sorted((path for path in (run / "checkpoints").glob("step-*") if path.is_dir()), reverse=True)


def read_manifest(folder: Path, full: bool = True) -> CheckpointManifest:
    """Read and check one checkpoint: its manifest, the size of every file and, with `full`, every hash.

    Raises ValueError saying what is damaged.
    """
    try:
        manifest = CheckpointManifest.model_validate_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{folder}: no {MANIFEST}, so this is not a finished checkpoint") from None
    except (OSError, ValidationError) as error:
        raise ValueError(f"{folder / MANIFEST}: damaged: {' '.join(str(error).split())[:200]}") from None
    for name, (size, digest) in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path}: missing")
        if path.stat().st_size != size:
            raise ValueError(f"{path}: {path.stat().st_size} bytes instead of {size}")
        if full and _digest(path) != digest:
            raise ValueError(f"{path}: its content has changed since it was written (xxh3-128 differs)")
    return manifest


def newest_good(run: Path, full: bool = True) -> tuple[Path, CheckpointManifest, list[str]] | None:
    """The newest intact checkpoint, and a sentence for each damaged one passed over; None when there is none at all.

    `full`: as in `read_manifest`.
    Raises ValueError when checkpoints exist but every one is damaged: starting afresh would throw a run away.
    """
    damaged = []
    for folder in steps(run):
        try:
            return folder, read_manifest(folder, full), damaged
        except ValueError as error:
            damaged.append(f"damaged checkpoint passed over: {error}")
    if damaged:
        raise ValueError(
            f"{run}: every checkpoint is damaged; restore one or choose another --output\n" + "\n".join(damaged)
        )
    return None


def agree_on_checkpoint(run: Path) -> tuple[tuple[Path, CheckpointManifest] | None, list[str]]:
    """The first rank's `newest_good`, told to all ranks; its ValueError is raised on all of them.

    What an interrupted save left behind is deleted first.
    """
    message: list = [None]
    if dist.get_rank() == 0:
        for leftover in (run / "checkpoints").glob(".*.partial"):
            shutil.rmtree(leftover)
        try:
            message = [newest_good(run)]
        except ValueError as error:
            message = [error]
    dist.broadcast_object_list(message, src=0)
    if isinstance(message[0], ValueError):
        raise message[0]
    return (message[0][:2], message[0][2]) if message[0] else (None, [])


def find(run: Path, step: int | None = None) -> tuple[Path, CheckpointManifest]:
    """A checkpoint to read from: the given step's, else the newest good one, with a warning on stderr for each damaged.

    Raises ValueError when there is none.
    """
    if step is not None:
        folder = run / "checkpoints" / f"step-{step:08d}"
        if not folder.is_dir():
            known = ", ".join(str(int(path.name.removeprefix("step-"))) for path in reversed(steps(run)))
            raise ValueError(f"{run} has no checkpoint of step {step}; there are: {known or 'none'}")
        return folder, read_manifest(folder)
    if (found := newest_good(run)) is None:
        raise ValueError(f"{run} has no checkpoint: give the --output folder of a training run")
    for sentence in found[2]:
        print(sentence, file=sys.stderr)
    return found[0], found[1]


def _retire(root: Path, policy: CheckpointConfig) -> None:
    for folder in steps(root.parent)[policy.keep_last :]:
        step = int(folder.name.removeprefix("step-"))
        if policy.keep_every_steps and step % policy.keep_every_steps == 0:
            continue
        doomed = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _sync_and_hash(folder: Path) -> dict[str, tuple[int, str]]:
    """Sizes and digests of all files, the work shared between the ranks."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    mine = {}
    for name in names[dist.get_rank() :: dist.get_world_size()]:
        path = folder / name
        with path.open("rb") as file:
            os.fsync(file.fileno())
        mine[name] = (path.stat().st_size, _digest(path))
    shares: list[dict | None] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    return {name: entry for share in shares for name, entry in share.items()}


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
