"""The folder of a run: one process group at a time may write to it, and `run.json` says what runs there."""

import json
from pathlib import Path
from typing import IO, Any

from engine.run.plan import RunPlan
from storage.atomic import write_atomically
from storage.locks import lock, still_at
from training.environment import environment


def claim_run(run: Path) -> IO[str]:
    """Create the folder and lock it for as long as the returned file is open. Raises ValueError if another has it."""
    if run.exists() and not run.is_dir():
        raise ValueError(f"--output {run} is a file: give a folder")
    try:
        run.mkdir(parents=True, exist_ok=True)
        return lock(run / ".lock")
    except BlockingIOError:
        raise ValueError(
            f"another training process is writing to {run}: wait for it or choose another --output"
        ) from None
    except OSError as error:
        raise ValueError(f"--output {run}: {error.strerror}") from None


def check_claim(run: Path, claim: IO[str]) -> None:
    """Raise ValueError when the folder is no longer the one that `claim_run` was given."""
    if not still_at(run / ".lock", claim):
        raise ValueError(
            f"{run} was removed, moved or replaced while training wrote to it, or its .lock was: nothing more can be kept "
            "there; put it back and run the same command again"
        )


def describe(plan: RunPlan) -> dict[str, Any]:
    """What determines this run, JSON-able: kept in run.json, in every checkpoint and in the W&B config."""
    return {
        "recipe": plan.recipe.model_dump(mode="json"),
        "ds_config": plan.ds_config,
        "environment": environment(),
        "data": plan.stages[0].describe_data() | {"stages": [stage.describe() for stage in plan.stages]},
    }


def layout_facts(plan: RunPlan) -> dict[str, int]:
    """The fields of `engine.layout.mesh.Mesh` that every rank has the same."""
    return {name: size for name, size in plan.mesh._asdict().items() if name != "rank"}


def fill_run(run: Path, facts: dict[str, Any]) -> None:
    """Write RUN/run.json and copy the data's tokenizer, so that the run can be read without its data."""
    write_atomically(run / "run.json", json.dumps(facts, indent=1).encode())
    tokenizer = Path(facts["data"]["path"]) / facts["data"]["tokenizer"]["file"]
    if not tokenizer.is_file():
        raise ValueError(f"{tokenizer} is missing: the tokenizer belongs to the data set, restore it")
    for file in tokenizer.parent.rglob("*"):
        if file.is_file():
            place = run / "tokenizer" / file.relative_to(tokenizer.parent)
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, file.read_bytes())
