"""Layouts that can be compared: read from a command line, checked against recipe and data, run in launches of their own."""

import contextlib
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil

from console.progress import say
from training.records import read_records

if TYPE_CHECKING:
    from engine.run.plan import RunPlan

SYNTAX = "[NAME=]FILE.json:RANKS[:STAGES] [KEY=VALUE ...] [--section.key VALUE ...]"
LAYOUT = re.compile(r"(?:([^=:]+)=)?([^=:]+\.json):(\d+)(?::(\d+))?((?:\s.*)?)", re.DOTALL)
EXCEPTION = re.compile(r"^[\w.]*(?:Error|Exception)\b.*", re.MULTILINE)
LOG_TAIL_LINES = 30
POLL_SECONDS = 0.25


class LaunchFailed(ValueError):
    """A layout that the plan allowed ended with an error."""


class Layout(NamedTuple):
    name: str
    file: str
    """A DeepSpeed JSON."""
    ranks: int
    stages: int | None
    """Pipeline stages, for a JSON that leaves them open."""
    changes: dict[str, Any]
    """Dotted keys of the JSON and the values that they get here."""
    overrides: dict[str, str]
    """Recipe keys of this layout only."""

    def write_config(self, folder: Path) -> str:
        """The JSON file to run: the layout's own, or a changed copy of it in `folder`."""
        if not self.changes:
            return self.file
        from engine.ds_json.read import read_ds_config

        tree = read_ds_config(self.file)
        for dotted, value in self.changes.items():
            *sections, key = dotted.split(".")
            place = tree
            for section in sections:
                place = place.setdefault(section, {})
                if not isinstance(place, dict):
                    raise ValueError(f"{self.file}: {dotted} cannot be set, {section} is {place!r}")
            place[key] = value
        copy = folder / Path(self.file).name
        copy.write_text(json.dumps(tree))
        return str(copy)


class Setting(NamedTuple):
    """What all layouts of one comparison share."""

    recipe: str
    overrides: dict[str, str]
    data: str


class StepRecord(NamedTuple):
    """One optimizer step of a whole launch."""

    step: int
    loss: float
    grad_norm: float
    applied: bool
    samples: str
    """Digest of the rows that the data-parallel ranks trained on, in whatever order."""
    seconds: float
    """Of the slowest rank, the wait for data included."""
    memory_bytes: int
    """Most that one rank has held so far."""
    wire_bytes: float
    """What leaves the busiest rank in bandwidth-optimal collectives (see `engine.reduction.wire`)."""


def parse_layout(text: str, flag: str = "--layout") -> Layout:
    """Read `SYNTAX`. Raises ValueError for anything else."""
    match = LAYOUT.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{flag} {text!r} is not {SYNTAX}")
    name, file, ranks, stages, rest = match.groups()
    changes: dict[str, Any] = {}
    overrides: dict[str, str] = {}
    words = iter(shlex.split(rest))
    for word in words:
        key, given, value = word.partition("=")
        if word.startswith("--"):
            said = value if given else next(words, None)
            if said is None:
                raise ValueError(f"{flag} {text!r}: {word} has no value")
            overrides[key.removeprefix("--")] = said
        elif given and key:
            changes[key] = _json_value(value)
        else:
            raise ValueError(
                f"{flag} {text!r}: {word!r} is neither KEY=VALUE (of the JSON) nor --section.key (of the recipe)"
            )
    if int(ranks) < 1:
        raise ValueError(f"{flag} {text!r}: a layout has at least one rank")
    described = " ".join(
        [f"{Path(file).stem} x{ranks}", *([f"in {stages} stages"] if stages else []), *shlex.split(rest)]
    )
    return Layout((name or described).strip(), file, int(ranks), int(stages) if stages else None, changes, overrides)


def _json_value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def plan_layout(layout: Layout, setting: Setting, folder: Path) -> "RunPlan":
    """The plan as the layout's first rank will make it. Raises ValueError with the reasons why there is none."""
    from engine.run.plan import make_plan
    from launch.topology import read_topology, shell_environment

    last = {"RANK": layout.ranks - 1, "LOCAL_RANK": layout.ranks - 1, "WORLD_SIZE": layout.ranks}
    here = shell_environment() | {"MASTER_ADDR": "", "MASTER_PORT": ""} | {key: str(n) for key, n in last.items()}
    config = layout.write_config(folder)
    try:
        topology = read_topology(here)  # of the last rank, which may lack a GPU
        overrides = setting.overrides | layout.overrides
        return make_plan(setting.recipe, overrides, config, setting.data, topology, {"pipeline": layout.stages})
    except ValueError as error:
        raise ValueError(str(error).replace(config, layout.file)) from None


def rounds_more(plan: "RunPlan") -> bool:
    """Whether this layout computes or communicates in less than float32."""
    config = plan.ds_config
    zero = config.get("zero_optimization", {})
    quantized = any(zero.get(key) for key in ("zero_quantized_weights", "zero_quantized_gradients"))
    narrow = config.get("communication_data_type") not in (None, "fp32")
    return bool(plan.half_precision or quantized or narrow or "gradient_compression" in config)


def launch(
    layout: Layout, setting: Setting, run: Path, last_step: int, folder: Path, progress: Callable[[int], None]
) -> list[StepRecord]:
    """Train up to `last_step` in a launch of its own, from the newest checkpoint in `run` or the start; save one at the end.

    `folder` takes logs and records; `progress` is told the steps done so far. Raises LaunchFailed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    overrides = setting.overrides | layout.overrides
    files = {"recipe": setting.recipe, "ds_config": layout.write_config(folder), "data": setting.data}
    job = files | {"overrides": overrides, "stages": layout.stages, "run": str(run), "last_step": last_step}
    (folder / "job.json").write_text(json.dumps(job))
    python = [sys.executable, "-m"]
    if layout.ranks > 1:
        python += [
            "torch.distributed.run",
            "--standalone",
            "--local-addr=127.0.0.1",
            f"--nproc-per-node={layout.ranks}",
            "-m",
        ]
    with (folder / "log").open("wb") as log:
        command = [*python, "tools.layouts.rank", str(folder)]
        process = subprocess.Popen(command, env=_environment(layout.ranks), stdout=log, stderr=subprocess.STDOUT)
    try:
        while process.poll() is None:
            progress(len(_records(folder, 0)))
            time.sleep(POLL_SECONDS)
    finally:
        if process.poll() is None:
            _kill(process)
    if process.returncode:
        raise LaunchFailed(_reason(folder, process.returncode))
    return _over_ranks([_records(folder, rank) for rank in range(layout.ranks)])


def _kill(process: subprocess.Popen) -> None:
    victims: list[psutil.Process | subprocess.Popen] = [*psutil.Process(process.pid).children(recursive=True), process]
    for victim in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    process.wait()


def _environment(ranks: int) -> dict[str, str]:
    """This shell's, without a launcher's variables; the ranks share the cores evenly unless the user said otherwise."""
    from launch.topology import LAUNCHER_VARIABLES, shell_environment

    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    environment = {"OMP_NUM_THREADS": str(threads)} | shell_environment()
    return {name: value for name, value in environment.items() if name not in LAUNCHER_VARIABLES}


def _records(folder: Path, rank: int) -> list[dict]:
    file = folder / f"rank-{rank}.jsonl"
    return list(read_records(file)) if file.exists() else []


def _reason(folder: Path, code: int) -> str:
    """The user's sentences among the output of a failed launch, else its first exception (and its last lines on stderr)."""
    text = (folder / "log").read_text(errors="replace")
    if sentences := list(dict.fromkeys(re.findall(r"^error: (.*)", text, re.MULTILINE))):
        return "; ".join(sentences)
    say("\n".join(text.splitlines()[-LOG_TAIL_LINES:]))
    found = EXCEPTION.search(text)
    return f"ended with exit code {code}" + (f": {found[0]}" if found else "; its last output is above")


def _over_ranks(ranks: list[list[dict]]) -> list[StepRecord]:
    steps = []
    for records in zip(*ranks, strict=True):
        by_data_rank = {record["data_rank"]: record["rows"] for record in records}
        if any(record["rows"] != by_data_rank[record["data_rank"]] for record in records):
            raise LaunchFailed(f"step {records[0]['step']}: ranks that must work on the same rows had different ones")
        rows = sorted(row for rows in by_data_rank.values() for row in rows)
        same = {key: records[0][key] for key in ("step", "loss", "grad_norm", "applied")}
        worst = {key: max(record[key] for record in records) for key in ("seconds", "memory_bytes", "wire_bytes")}
        samples = hashlib.blake2b("".join(rows).encode(), digest_size=8).hexdigest()
        steps.append(StepRecord(samples=samples, **same, **worst))
    return steps


def gpus() -> int:
    """GPUs that a layout's ranks would be placed on; 0 where they run on the CPU."""
    import torch

    from launch.topology import shell_environment

    return 0 if shell_environment().get("DS_ACCELERATOR") == "cpu" else torch.cuda.device_count()
