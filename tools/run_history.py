"""What a run's folder says of its past: the records with their place in tokens and hours, and the facts of `run.json`."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tools.evaluation.files import read_evaluations
from training.goodput import RunTimes, read_times
from training.metrics import LAYERS_FILE, METRICS_FILE
from training.records import read_records

FACTS_FILE, SAMPLES_FILE = "run.json", "samples.jsonl"


class Run(NamedTuple):
    """Every record also has its `hours` (see `hours_trained`) and its `tokens`."""

    name: str
    folder: str
    steps: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    events: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    """What every layer was like at some steps."""
    facts: dict[str, Any]
    evaluations: list[dict[str, Any]]
    times: RunTimes | None
    samples: list[dict[str, Any]]
    """What `tools.generate` wrote with its checkpoints."""


def read_run(run_dir: Path) -> Run:
    """Raises ValueError, in one sentence, where there is no run or its files are damaged."""
    metrics, facts = run_dir / METRICS_FILE, run_dir / FACTS_FILE
    if not metrics.is_file():
        raise ValueError(f"{metrics} does not exist: give the folder that train.py was told to write (--output)")
    try:
        known = json.loads(facts.read_bytes()) if facts.exists() else {}
    except ValueError as error:
        raise ValueError(f"{facts} is not valid JSON ({error})") from None
    records = _placed(read_records(metrics))
    return Run(
        run_dir.resolve().name,
        str(run_dir),
        [record for record in records if is_step(record)],
        [record for record in records if "validation" in record],
        [record for record in records if "event" in record],
        _between(_records_if_any(run_dir / LAYERS_FILE), records),
        known if isinstance(known, dict) else {"run": known},
        read_evaluations(run_dir),
        read_times(run_dir),
        _records_if_any(run_dir / SAMPLES_FILE),
    )


def _records_if_any(path: Path) -> list[dict[str, Any]]:
    return read_records(path) if path.is_file() else []


def is_step(record: dict[str, Any]) -> bool:
    """Whether it has the metrics of an optimizer step."""
    return "loss" in record and "event" not in record


def launches(records: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The records of each launch: it begins with the event `resume`, or with the notices and the `restart` right before that."""
    begins = []
    for number, record in enumerate(records):
        if record.get("event") == "resume":
            while number and records[number - 1].get("event") in ("notice", "restart"):
                number -= 1
            begins.append(number)
    bounds = sorted({0, *begins, len(records)})
    return [records[begin:end] for begin, end in pairwise(bounds)]


def hours_trained(records: list[dict[str, Any]]) -> list[float]:
    """Hours of training up to each record, without the time between launches, and without steps that were done again."""
    hours: list[float] = []
    trained = 0.0
    for launch in launches(records):
        first = launch[0]
        before = first["time"] - (first["step_seconds"] * first["step"] if is_step(first) and not hours else 0.0)
        for record in launch:
            trained += max(0.0, record["time"] - before) / 3600
            before = record["time"]
            hours.append(trained)
    return hours


def _placed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    logged = [(record["step"], record["tokens"]) for record in records if is_step(record)]
    steps, tokens = zip((0, 0), *logged, strict=True)
    of_step = np.interp([record["step"] for record in records], steps, tokens) if records else []
    places = zip(records, hours_trained(records), of_step, strict=True)
    return [{"tokens": round(tokens)} | record | {"hours": hours} for record, hours, tokens in places]


def _between(records: list[dict[str, Any]], placed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Other records of the same run, with the place of each among those that have one."""
    if not records or not placed:
        return []
    steps = [record["step"] for record in records]
    known = {record["step"]: record for record in placed}  # of several the last
    places = {
        axis: np.interp(steps, [*known], [record[axis] for record in known.values()]) for axis in ("tokens", "hours")
    }
    return [
        record | {"tokens": round(tokens), "hours": hours}
        for record, tokens, hours in zip(records, places["tokens"].tolist(), places["hours"].tolist(), strict=True)
    ]
