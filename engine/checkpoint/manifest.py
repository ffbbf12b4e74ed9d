"""What a checkpoint says of itself: `manifest.json`, its digest, and which folders are checkpoints at all.

A folder counts only under the name that its own state gives it, and only with the files that its manifest names. The
digests prove that nothing changed by accident; against somebody who rewrites files and digests they prove nothing, which
is why no file is ever unpickled freely (`engine.safe_load`).
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash
from pydantic import BaseModel, ConfigDict

from engine.checkpoint.consistency import contradictions
from training.state import PriorState, TrainState

MANIFEST = "manifest.json"
STEP_FOLDER = re.compile(r"step-(\d{8,})")

Files = dict[str, tuple[int, str]]
"""Name in the folder: size in bytes and xxh3-128 digest."""
FindChange = Callable[[Path, Files], str | None]
"""Of a folder and its files: what is wrong with the content of the first that is not as it was written."""


class StateLayout(BaseModel):
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

    format_version: int = 2
    """2: the file carries a digest of all the rest; 1: it does not, and is read all the same."""
    layout: StateLayout
    parameters: list[str] = []
    """Names in the order of the optimizer's state, where DeepSpeed's files do not say it (stage 0)."""
    base: str | None = None
    """Digest of weights that are not in these files because only adapters were trained."""
    prior: PriorState | None = None
    """Of a mixture whose prior is learned."""
    state: TrainState
    recipe: dict[str, Any]
    ds_config: dict[str, Any]
    environment: dict[str, Any]
    data: dict[str, Any]
    """Path, fingerprint, sequence length and tokenizer of the training data; under `stages` those of every stage."""
    files: Files
    created: str


def seal(manifest: CheckpointManifest) -> bytes:
    """The content of `manifest.json`, with the digest of everything else in it."""
    fields = manifest.model_dump(mode="json")
    return json.dumps(fields | {"digest": _digest_of_fields(fields)}, indent=1).encode()


def unseal(content: bytes) -> CheckpointManifest:
    """Raises ValueError unless `content` is what `seal` made, or a manifest of format 1, which had no digest, and makes
    sense."""
    fields = json.loads(content)
    if not isinstance(fields, dict):
        raise ValueError("not a JSON object")
    digest = fields.pop("digest", None)
    manifest = CheckpointManifest.model_validate(fields)
    if digest != (None if manifest.format_version == 1 else _digest_of_fields(fields)):
        raise ValueError("its content has changed since it was written (its own digest differs)")
    if found := contradictions(manifest.recipe, manifest.data, manifest.state):
        raise ValueError(f"its parts do not belong together: {'; '.join(found)}")
    return manifest


def _digest_of_fields(fields: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def step_of(folder: Path) -> int | None:
    """The step that a folder's name claims; None where it is not the name of a checkpoint."""
    found = STEP_FOLDER.fullmatch(folder.name)
    return int(found[1]) if found and folder.name == folder_name(int(found[1])) else None


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def steps(run: Path) -> list[Path]:
    """The folders of a run that have a checkpoint's name, newest first, good or not."""
    found = ((step_of(path), path) for path in (run / "checkpoints").glob("step-*") if path.is_dir())
    return [path for _, path in sorted(((step, path) for step, path in found if step is not None), reverse=True)]


def strangers(run: Path) -> list[Path]:
    """Checkpoints under names that no checkpoint has, `best` or `step-00000010.bak`: never read, counted or deleted."""
    visible = (path for path in (run / "checkpoints").glob("[!.]*") if (path / MANIFEST).is_file())
    return sorted(path for path in visible if step_of(path) is None)


def folder_of(run: Path, step: int) -> Path:
    """Where a run has the checkpoint of this step. Raises ValueError, saying which there are, when it has none."""
    known = {step_of(folder): folder for folder in reversed(steps(run))}
    if step not in known:
        raise ValueError(f"{run} has no checkpoint of step {step}; there are: {', '.join(map(str, known)) or 'none'}")
    return known[step]


def find_change(folder: Path, files: Files) -> str | None:
    """A `FindChange` that hashes file after file."""
    changes = (change_of(folder / name, digest) for name, (_, digest) in files.items())
    return next((change for change in changes if change), None)


def change_of(path: Path, digest: str) -> str | None:
    """A sentence unless the file's content has this digest."""
    try:
        changed = digest_of_file(path) != digest
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    return f"{path}: its content has changed since it was written (xxh3-128 differs)" if changed else None


def read_manifest(folder: Path, full: bool = True, find_change: FindChange = find_change) -> CheckpointManifest:
    """Read and check one checkpoint: its manifest, the size of every file and, with `full`, every hash.

    Raises ValueError saying what is damaged.
    """
    try:
        manifest = unseal((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{folder}: no {MANIFEST}, so this is not a finished checkpoint") from None
    except (OSError, ValueError, RecursionError) as error:  # pydantic's and json's errors are ValueErrors
        raise ValueError(f"{folder / MANIFEST}: damaged: {' '.join(str(error).split())[:200]}") from None
    if step_of(folder) != manifest.state.step:
        raise ValueError(
            f"{folder}: holds step {manifest.state.step}, so it was renamed or copied; it is read under its own name only, "
            f"{folder_name(manifest.state.step)}"
        )
    if not manifest.files:
        raise ValueError(f"{folder / MANIFEST}: damaged: it names no files")
    for name, (size, _) in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path}: missing")
        try:
            found = path.stat().st_size
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
        if found != size:
            raise ValueError(f"{path}: {found} bytes instead of {size}")
    if full and (change := find_change(folder, manifest.files)):
        raise ValueError(change)
    return manifest


def digest_of_file(path: Path) -> str:
    """Its xxh3-128, as 32 hexadecimal digits."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()
