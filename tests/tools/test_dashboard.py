"""The dashboard shows every key that a run logs, and its JSON is one that W&B's own library reads back."""

import json
import re

import pytest
from wandb_workspaces.workspaces import Workspace
from wandb_workspaces.workspaces.internal import View

from tests.processes import run_cli
from tests.training.test_metrics import log, open_logger
from tools.dashboard import main, specification, workspace
from training.goodput import KINDS
from training.metrics import LAYERS_FILE, METRICS_FILE
from training.records import read_records
from training.wandb_run import wandb_values

FIGURES = ("grad_norm", "parameter_rms", "update_rms", "activation_rms", "max_attention_logit")


@pytest.fixture
def spec():
    return specification(workspace("team", "books", "Longform"))


def panels(spec) -> list[dict]:
    sections = spec["spec"]["section"]["panelBankConfig"]["sections"]
    return [panel["config"] for section in sections for panel in section["panels"]]


def test_every_logged_key_is_in_exactly_one_panel(spec, tmp_path):
    with open_logger(tmp_path) as logger:
        log(logger, 1, wall_seconds=dict.fromkeys(KINDS, 1.0))
        logger.log_validation(
            1, {"long books": {"loss": 2.0, "bits_per_byte": 0.75, "targets": 3, "loss_by_source": {"web": 2.5}}}
        )
        logger.log_event(1, "checkpoint")
        logger.log_layers(1, {kind: {"layers.0": 1.0, "norm": 2.0} for kind in FIGURES}, {"decay": 3.0})
        logger.log_event(1, "plan", planned_step_seconds=1.0, measured_step_seconds=1.25)
    logged = {
        key
        for file in (METRICS_FILE, LAYERS_FILE)
        for record in read_records(tmp_path / file)
        for key in wandb_values(record)
    }
    shown = panels(spec)
    for key in logged:
        here = [p for p in shown if key in p.get("metrics", ()) or re.search(p.get("metricRegex", "$^"), key)]
        assert len(here) == 1, key
    assert {key for panel in shown for key in panel.get("metrics", ())} <= logged
    assert all(panel.get("useMetricRegex") for panel in shown if "metricRegex" in panel)


def test_the_json_is_a_view_that_the_library_reads_back(spec):
    view = Workspace._from_model(View.model_validate(spec))
    assert (view.entity, view.project, view.name) == ("team", "books", "Longform")
    assert specification(view) == spec


def test_print_needs_no_network(capsys):
    assert main(["--entity", "team", "--project", "books", "--print"]) == 0
    spec = json.loads(capsys.readouterr().out)
    assert spec["project"] == "books"
    assert len(panels(spec)) >= 15


def test_saving_without_a_key_is_refused_in_one_sentence(tmp_path):
    environment = {"HOME": str(tmp_path), "WANDB_MODE": None}
    done = run_cli(["python", "-m", "tools.dashboard", "--entity", "team"], env=environment)
    assert done.returncode == 2
    assert done.stderr == "tools.dashboard: no W&B key: run `wandb login`, or use --print\n"
    assert done.stdout == ""
