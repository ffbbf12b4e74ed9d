"""Event files that TensorBoard's own reader opens: each step once, as it was done last."""

import pytest

from tests.training.test_metrics import log, open_logger
from training.metrics import LAYERS_FILE, METRICS_FILE
from training.records import read_records
from training.sections import MetricsConfig
from training.tensorboard_run import FOLDER
from training.wandb_run import wandb_values

event_accumulator = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="requirements-extra.txt is not installed"
)
WITH_TENSORBOARD = MetricsConfig(log_every_steps=1, wandb=False, tensorboard=True)


def read(run_dir) -> dict[str, dict[int, float]]:
    """What TensorBoard shows: by name, each step's last value."""
    events = event_accumulator.EventAccumulator(str(run_dir / FOLDER), {"scalars": 0})
    events.Reload()
    shown = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    for name, scalars in shown.items():
        assert [each.step for each in scalars] == sorted({each.step for each in scalars}), name
    return {name: {each.step: each.value for each in scalars} for name, scalars in shown.items() if scalars}


def recorded(run_dir) -> dict[str, dict[int, float]]:
    """The same from metrics.jsonl and layers.jsonl."""
    found: dict[str, dict[int, float]] = {}
    for record in [*read_records(run_dir / METRICS_FILE), *read_records(run_dir / LAYERS_FILE)]:
        for name, value in wandb_values(record).items():
            found.setdefault(name, {})[record["step"]] = pytest.approx(value, rel=1e-6)
    return found


def test_each_step_is_shown_as_it_was_done_last(tmp_path):
    with open_logger(tmp_path, config=WITH_TENSORBOARD) as logger:
        for step in range(1, 9):
            log(logger, step)
        logger.log_validation(8, {"books": {"loss": 2.0, "bits_per_byte": 0.75, "targets": 4096}})
    assert read(tmp_path) == recorded(tmp_path)
    with open_logger(tmp_path, config=WITH_TENSORBOARD, resumed_step=5) as logger:
        for step in range(6, 11):
            log(logger, step, loss=0.5 + step)
            logger.log_layers(step, {"grad_norm": {"layers.0": step}})
        logger.go_back(7)
        for step in range(8, 13):
            log(logger, step, loss=0.25 * step)
        logger.log_event(12, "checkpoint", seconds=1.5)
    shown = read(tmp_path)
    assert shown == recorded(tmp_path)
    assert [*shown["train/loss"]] == [*range(1, 13)]
    assert (shown["train/loss"][7], shown["train/loss"][8]) == (7.5, 2.0)


def test_what_cannot_be_written_does_not_end_the_run(tmp_path, capsys):
    (tmp_path / FOLDER).write_text("in the way")
    with open_logger(tmp_path, config=WITH_TENSORBOARD) as logger:
        for step in (1, 2):
            log(logger, step)
        logger.go_back(1)
        log(logger, 2)
    assert len(read_records(tmp_path / METRICS_FILE)) == 2
    warning = capsys.readouterr().err
    assert warning.startswith("warning: TensorBoard records nothing from here on in ")
    assert str(tmp_path / FOLDER) in warning


def test_other_ranks_write_nothing(tmp_path):
    with open_logger(tmp_path, config=WITH_TENSORBOARD, is_first_rank=False) as logger:
        log(logger, 1)
    assert not (tmp_path / FOLDER).exists()
