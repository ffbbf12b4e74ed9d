"""One logger, three outputs: the console, metrics.jsonl, and (in test_wandb_run) Weights & Biases."""

import contextlib
import math
import os
import re
import sys
import time

import pytest

from training.goodput import KINDS
from training.metrics import LAYERS_FILE, METRICS_FILE, MetricsLogger, with_prefix
from training.records import read_records
from training.sections import MetricsConfig
from training.throughput import Rates
from training.wandb_run import wandb_values

WITHOUT_WANDB = MetricsConfig(log_every_steps=5, wandb=False)


def open_logger(run_dir, **options) -> MetricsLogger:
    options = {"is_first_rank": True, "total_steps": 1000, "run_id": "r1", "facts": {}} | options
    return MetricsLogger(run_dir, options.pop("config", WITHOUT_WANDB), **options)


def log(logger: MetricsLogger, step: int, **changes) -> None:
    values = {
        "samples": 8 * step,
        "tokens": 1024 * step,
        "loss": 10 / step,
        "objective": 10 / step + 0.01,
        "learning_rate": 3e-4,
        "grad_norm": 1.25,
        "skipped_steps": 0,
        "rates": Rates(31_250.0, 0.412, 0.003, 0.5),
        "attention_imbalance": 0.07,
        "memory_bytes": 2**30,
    }
    logger.log_step(step, **(values | changes))


def test_where_the_time_went_is_part_of_a_record(tmp_path):
    seconds = dict.fromkeys(KINDS, 0.0) | {"productive": 30.00049, "start_up": 10.0}
    with open_logger(tmp_path) as logger:
        log(logger, 5, wall_seconds=seconds)
    (record,) = read_records(tmp_path / METRICS_FILE)
    assert record["goodput"] == 0.75
    assert record["wall_seconds"] == seconds | {"productive": 30.0}
    shown = {key: value for key, value in wandb_values(record).items() if key.startswith("goodput/")}
    assert shown.pop("goodput/share") == 0.75
    assert shown == {f"goodput/{kind}_seconds": value for kind, value in record["wall_seconds"].items()}


LAYERS = {"grad_norm": {"embed_tokens": 0.5, "layers.0": 1 / 3}, "max_attention_logit": {"layers.0": math.inf}}


def test_layers_have_a_file_of_their_own_which_goes_back_with_the_run(tmp_path):
    with open_logger(tmp_path) as logger:
        for step in (1, 100, 200):
            log(logger, step)
            logger.log_layers(step, LAYERS)
    with open_logger(tmp_path, resumed_step=150) as logger:
        logger.log_layers(200, LAYERS)
        logger.log_layers(300, LAYERS)
        logger.go_back(200)
    records = read_records(tmp_path / LAYERS_FILE)
    assert [record["step"] for record in records] == [1, 100, 200]
    assert records[0]["layers"] == LAYERS | {
        "grad_norm": {"embed_tokens": 0.5, "layers.0": 0.333333},
        "max_attention_logit": {"layers.0": None},
    }
    assert wandb_values(records[0]) == {"layers/grad_norm/embed_tokens": 0.5, "layers/grad_norm/layers.0": 0.333333}
    assert not any("layers" in record for record in read_records(tmp_path / METRICS_FILE))


def test_records_hold_every_key(tmp_path):
    began = time.time()
    with open_logger(tmp_path) as logger:
        log(logger, 10)
        logger.log_validation(10, {"books": {"loss": 2.0, "bits_per_byte": 0.75, "targets": 4096}})
        logger.log_event(10, "checkpoint", seconds=1.5)
    metrics, validation, event = read_records(tmp_path / METRICS_FILE)
    assert began - 1 <= metrics.pop("time") <= time.time() + 1
    assert metrics == {
        "step": 10,
        "samples": 80,
        "tokens": 10240,
        "loss": 1.0,
        "objective": 1.01,
        "learning_rate": 3e-4,
        "grad_norm": 1.25,
        "skipped_steps": 0,
        "tokens_per_second": 31_250.0,
        "mfu": 0.412,
        "data_wait_fraction": 0.003,
        "step_seconds": 0.5,
        "attention_imbalance": 0.07,
        "memory_bytes": 2**30,
        "eta_seconds": 495.0,
    }
    assert validation["validation"] == {"books": {"loss": 2.0, "bits_per_byte": 0.75, "targets": 4096}}
    assert (event["step"], event["event"], event["seconds"]) == (10, "checkpoint", 1.5)


def test_bytes_on_the_wire_are_recorded_where_they_are_counted(tmp_path):
    with open_logger(tmp_path) as logger:
        log(logger, 5, wire_bytes=4096)
        log(logger, 10, wire_bytes=None)
    first, second = read_records(tmp_path / METRICS_FILE)
    assert first["wire_bytes"] == 4096
    assert "wire_bytes" not in second


def test_a_resumed_logger_replaces_the_records_of_steps_done_again(tmp_path):
    with open_logger(tmp_path) as logger:
        for step in (5, 10, 15):
            log(logger, step)
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 20, "lo')
    with open_logger(tmp_path, resumed_step=10) as logger:
        logger.log_event(10, "resume", world_size=2)
        log(logger, 15, loss=7.0)
    records = read_records(tmp_path / METRICS_FILE)
    assert [record["step"] for record in records] == [5, 10, 10, 15]
    assert records[-1]["loss"] == 7.0


def test_other_ranks_are_silent_but_agree_on_what_is_due(tmp_path, capsys):
    with open_logger(tmp_path, total_steps=12, is_first_rank=False) as logger:
        assert [step for step in range(1, 13) if logger.due(step)] == [1, 5, 10, 12]
        log(logger, 5)
        logger.log_validation(5, {"books": {"loss": 2.0}})
        logger.log_event(5, "checkpoint")
        assert logger.summary()["step"] == 5
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_console_lines_are_aligned(tmp_path, capsys):
    with open_logger(tmp_path, total_steps=12_000) as logger:
        log(logger, 5, loss=11.2, grad_norm=123.4567, rates=Rates(999.0, 0.05, 0.0, 0.5))
        log(logger, 10_000, loss=0.9, learning_rate=1e-10, rates=Rates(1_234_567.0, 0.5, 1.0, 0.5))
        log(logger, 11_999, loss=math.nan, grad_norm=None, skipped_steps=3)
    lines = capsys.readouterr().out.splitlines()
    bars = [[match.start() for match in re.finditer(r"\|", line)][:7] for line in lines]
    assert bars[0] == bars[1] == bars[2]
    assert lines[1].startswith(
        "step 10000/12000 | loss  0.9000 | lr 1.00e-10 | norm   1.250 |  1.23M tok/s | mfu  50.0%"
    )
    assert "loss     nan | " in lines[2]
    assert lines[2].endswith("eta 0:00:00 | skipped 3")


def test_a_closed_console_does_not_end_the_run(tmp_path, monkeypatch):
    """As when the launcher, or the ssh session that held it, has gone."""
    ends = os.pipe()
    os.close(ends[0])
    with os.fdopen(ends[1], "w", closefd=True) as console, open_logger(tmp_path) as logger:
        monkeypatch.setattr(sys, "stdout", console)
        for step in (5, 10):
            log(logger, step)
        with contextlib.suppress(BrokenPipeError):
            console.close()
    assert [record["step"] for record in read_records(tmp_path / METRICS_FILE)] == [5, 10]


def test_console_shows_validation_events_and_a_measured_peak(tmp_path, capsys):
    with open_logger(tmp_path, peak_label="peak") as logger:
        log(logger, 10)
        logger.log_validation(10, {"books": {"loss": 2.0, "bits_per_byte": 0.75}, "web": {"loss": 3.0}})
        logger.log_event(10, "checkpoint", path="step-10", seconds=1.23456)
    lines = capsys.readouterr().out.splitlines()
    assert "| peak  41.2% |" in lines[0]
    assert lines[1] == "step   10/1000 | books loss 2.0000 (0.7500 bits/byte) | web loss 3.0000"
    assert lines[2] == "step   10/1000 | checkpoint path=step-10 seconds=1.235"


def test_summary_has_the_last_step_and_the_best_validation(tmp_path):
    with open_logger(tmp_path) as logger:
        assert logger.summary()["step"] == 0
        for step, loss in ((5, math.nan), (10, 2.0), (15, 2.5)):
            log(logger, step, rates=Rates(1000.0 * step, 0.1, 0.0, 0.5))
            logger.log_validation(step, {"books": {"loss": loss}})
        summary = logger.summary()
    assert summary["step"] == 15
    assert summary["tokens_per_second"] == 10_000.0
    assert summary["best_validation"] == {"books": {"step": 10, "loss": 2.0}}


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.1234, "0.123"), (999.4, "999"), (999.6, "1.00k"), (12_345, "12.3k"), (999_900, "1.00M"), (123e6, "123M")],
)
def test_prefixes(number, text):
    assert with_prefix(number) == text
