"""The offline run files that W&B itself writes, read back record by record."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.training.test_metrics import log
from training.metrics import METRICS_FILE, MetricsLogger
from training.records import read_records
from training.sections import MetricsConfig
from training.wandb_files import messages
from training.wandb_run import STEP_KEY, WANDB_KEYS, wandb_row, wandb_values

FACTS = {
    "recipe": {
        "training": {"seed": 0, "max_tokens": 10**12},
        "optimizer": {"betas": [0.9, 0.95], "max_grad_norm": None},
    },
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "environment": {"git": {"commit": "c0ffee", "dirty": False}, "host": "node-0"},
}

SCORES = {"validation/books/loss": 2.0, "validation/books/bits_per_byte": 0.75, "events/checkpoint": 1}


def run_launch(folder: str, fields: dict[str, Any], resumed_step: int, last_step: int, wandb_mode: str | None) -> bool:
    """What every rank of one launch does; returns whether wandb was imported."""
    logger = MetricsLogger(
        Path(folder),
        MetricsConfig(**fields),
        is_first_rank=os.environ["RANK"] == "0",
        total_steps=6,
        resumed_step=resumed_step,
        run_id="kept1234",
        facts=FACTS,
        wandb_mode=wandb_mode,
    )
    with logger:
        for step in range(resumed_step + 1, last_step + 1):
            log(logger, step, grad_norm=None if step == 2 else 1.25)
        logger.log_validation(last_step, {"books": {"loss": 2.0, "bits_per_byte": 0.75, "targets": 9}})
        logger.log_event(last_step, "checkpoint", seconds=0.5)
        if last_step < 6:
            logger.log_event(last_step, "stop", reason="SIGTERM")
            logger.close(75)
    return "wandb" in sys.modules


def launch(folder: Path, fields=None, resumed_step=0, last_step=4, mode=None, world_size=1, **env) -> list[bool]:
    environment = {"HOME": str(folder / "home"), "WANDB_MODE": None, **env}
    arguments = (str(folder), fields or {}, resumed_step, last_step, mode)
    return run_ranks(run_launch, world_size, *arguments, env=environment)


def records_of(path: Path) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    for message, _ in messages(path.read_bytes()):
        yield wandb_internal_pb2.Record.FromString(message)


def read_run(path: Path) -> tuple[Any, dict[str, Any], dict[int, dict[str, float]]]:
    """The run message, its config, and the history by step."""
    run, history = None, {}
    for record in records_of(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
        elif kind == "history":
            values = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item
            }
            history[record.history.step.num] = {k: v for k, v in values.items() if not k.startswith("_")}
    config = {item.key: json.loads(item.value_json) for item in run.config.update if item.key != "_wandb"}
    return run, config, history


def test_offline_run_and_its_resume_are_one_run(tmp_path):
    fields = {"wandb_project": "books", "wandb_tags": ["long"], "wandb_group": "sizes"}
    assert launch(tmp_path, fields, 0, 4, world_size=2) == [True, False]
    assert launch(tmp_path, fields, 2, 6) == [True]

    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-kept1234.wandb"), key=lambda file: file.stat().st_mtime)
    assert len(files) == 2
    merged = {}
    for file in files:
        run, config, history = read_run(file)
        assert not merged.keys() & history.keys(), "wandb sync would upload a step twice"
        assert (run.run_id, run.project, run.run_group, list(run.tags)) == ("kept1234", "books", "sizes", ["long"])
        assert run.display_name == tmp_path.name
        assert config == FACTS
        merged |= history

    expected: dict[int, dict[str, float]] = {}
    for record in read_records(tmp_path / METRICS_FILE):
        expected.setdefault(record["step"], {}).update(wandb_row(record))
    assert sorted(expected) == [1, 2, 3, 4, 5, 6]
    assert expected[6].keys() == {*WANDB_KEYS.values(), *SCORES, STEP_KEY}
    assert expected[1].keys() - expected[2].keys() == {"train/grad_norm"}
    expected[4] |= SCORES | {"events/stop": 1}  # of the first launch, which W&B cannot take back
    assert merged == expected
    endings = [[record.WhichOneof("record_type") for record in records_of(file)] for file in files]
    assert ["preempting" in kinds for kinds in endings] == [True, False]


def test_what_a_kill_took_from_wandb_is_sent_at_the_next_launch(tmp_path):
    """The first file is torn in the row of step 3, as a SIGKILL between two writes leaves it."""
    launch(tmp_path, {}, 0, 4)
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    cut = next(end for message, end in messages(file.read_bytes()) if b"train/loss" in message and end) + 1
    data = file.read_bytes()
    ends = [end for _, end in messages(data)]
    os.truncate(file, next(end for end in ends if end > cut) + 40)
    launch(tmp_path, {}, 4, 6)
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    histories = [read_run(path)[2] for path in files]
    assert not histories[0].keys() & histories[1].keys()
    merged, expected = histories[0] | histories[1], {}
    for record in read_records(tmp_path / METRICS_FILE):
        expected.setdefault(record["step"], {}).update(wandb_row(record))
    assert merged == expected
    for path in files:  # wandb sync stops at a torn end, before all later files
        assert [*messages(path.read_bytes())][-1][1] == path.stat().st_size


@pytest.mark.parametrize("trouble", [{"mode": "online"}, {"WANDB_API_KEY": "too short"}])
def test_the_environment_names_the_run_and_a_missing_or_wrong_key_does_not_stop_it(tmp_path, trouble):
    launch(tmp_path, **trouble, WANDB_PROJECT="mine", WANDB_NAME="today", WANDB_TAGS="a,b")
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    run, config, history = read_run(file)
    assert (run.project, run.display_name, list(run.tags)) == ("mine", "today", ["a", "b"])
    assert config == FACTS
    assert sorted(history) == [1, 2, 3, 4]


@pytest.mark.parametrize(("fields", "mode"), [({"wandb": False}, "online"), ({}, "disabled")])
def test_switched_off_wandb_is_not_even_imported(tmp_path, fields, mode):
    assert launch(tmp_path, fields, mode=mode) == [False]
    assert not (tmp_path / "wandb").exists()
    assert len(read_records(tmp_path / METRICS_FILE)) == 7


def test_other_records_send_only_their_own_numbers():
    assert wandb_values({"step": 3, "event": "skip", "loss": 9.0, "time": 1.0}) == {"events/skip": 1}
    scores = {"loss": float("nan"), "bits_per_byte": 0.5, "targets": 7}
    assert wandb_values({"step": 3, "validation": {"web": scores}}) == {"validation/web/bits_per_byte": 0.5}
