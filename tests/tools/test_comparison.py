"""Several runs on one page: their curves over each other, their figures, and what differs; parts of a page that are no curves."""

import json

import numpy as np
import pytest

from tests.tools.test_report import FACTS, HOSTILE, Page, numbers, write_run
from tests.tools.test_run_plots import write_layers, write_long_run
from tests.training.test_metrics import log, open_logger
from tools.comparison import read_runs
from tools.report import comparison_page, main, page
from tools.run_history import SAMPLES_FILE, read_run
from tools.shown import OF_GROUPS, OF_SOURCES, SERIES


@pytest.fixture
def runs(tmp_path):
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True)
        write_run(folder, last_step=40 - 10 * number)
        facts = FACTS | {"ds_config": {"zero_optimization": {"stage": 1 + number}}, "seed": HOSTILE * number}
        (folder / "run.json").write_text(json.dumps(facts))
    return folders


def test_the_same_curves_lie_over_each_other(runs):
    shown = Page(comparison_page(read_runs(runs)))
    drawn = shown.figure()
    names = ["a/run", "b/run"]
    losses = {trace.name: trace for trace in drawn.data if trace.yaxis == "y" and trace.visible is not False}
    assert [name for name in losses if "," not in name] == names
    assert numbers(losses["a/run"].x).tolist() == [*range(5, 41, 5)]
    assert numbers(losses["b/run"].x).tolist() == [*range(5, 31, 5)]
    np.testing.assert_allclose(numbers(losses["a/run, validation: books"].y), [4.5, 4.0])
    for number, _ in enumerate(SERIES, 2):
        assert [t.name for t in drawn.data if t.yaxis == f"y{number}" and t.visible is not False] == names
    colors = {trace.legendgroup: trace.line.color for trace in drawn.data}
    assert len(set(colors.values())) == 2


def test_figures_and_differences_are_tables(runs):
    shown = Page(comparison_page(read_runs(runs)))
    for words in ("zero_optimization.stage", "final loss", "3.0000", "3.5000", "last loss on", HOSTILE):
        assert words in shown.visible
    assert "hidden_size" not in shown.visible  # the same in both
    assert shown.tags.count("script") == 4
    assert not {"src", "href", "srcset"} & set(shown.attributes)


def test_the_command_takes_several_runs(runs, tmp_path, capsys):
    assert main([*map(str, runs), "-o", str(tmp_path / "both.html")]) == 0
    assert (tmp_path / "both.html").read_text().startswith("<!doctype html>")
    capsys.readouterr()
    assert main([str(runs[0]), str(runs[0]), "-o", str(tmp_path / "both.html")]) == 2
    assert capsys.readouterr().err == "tools.report: a run was given twice: give each once\n"


def test_steps_that_stand_out_are_named_with_their_documents(tmp_path):
    with open_logger(tmp_path, total_steps=40) as logger:
        for step in range(1, 41):
            log(logger, step, grad_norm=50.0 if step == 17 else 1.0 + 0.01 * step)
        logger.log_event(20, "skip", loss=None, grad_norm=None)
        logger.log_event(29, "spike", spike_step=30, action="rewind", reason="loss", documents=[f"7 of {HOSTILE}"])
    shown = Page(page(read_run(tmp_path)))
    for words in ("gradient norm 50, ", "was not applied", "spike: loss; rewind", f"7 of {HOSTILE}"):
        assert words in shown.visible
    assert shown.visible.count("times the median") == 1
    assert "data-run" in shown.attributes


def test_what_was_planned_stands_beside_what_was_measured(tmp_path):
    with open_logger(tmp_path) as logger:
        log(logger, 10)
        logger.log_event(20, "plan", planned_step_seconds=2.0, measured_step_seconds=2.5, planned_rank_memory=1e9)
    shown = Page(page(read_run(tmp_path)))
    for words in ("seconds a step22.5+25.0%", "memory at most1e+09–"):
        assert words in shown.visible
    (tmp_path / "other").mkdir()
    assert "planned" not in Page(page(read_run(write_run(tmp_path / "other", 10)))).visible


def test_losses_by_source_and_norms_by_group_have_panels(tmp_path):
    write_layers(write_long_run(tmp_path))
    with open_logger(tmp_path, resumed_step=200) as logger:
        by_source = {"books": 2.5, "web": 3.5}
        scores = {"loss": 3.0, "targets": 4, "loss_by_source": by_source}
        logger.log_validation(200, {"validation": scores})
        logger.log_layers(200, {"grad_norm": {"norm": 1.0}}, {"decay": 0.5, "no_decay": 0.25})
    drawn = Page(page(read_run(tmp_path))).figure()
    titles = [annotation.text for annotation in drawn.layout.annotations]
    assert {OF_GROUPS, OF_SOURCES} <= set(titles)
    values = {trace.name: numbers(trace.y)[-1] for trace in drawn.data if trace.type == "scatter" and trace.name}
    assert values["books (validation)"] == 2.5
    assert values["decay"] == 0.5


def test_samples_are_shown_as_text(tmp_path):
    write_run(tmp_path)
    record = {"step": 40, "prompt": "Enter ", "text": HOSTILE, "temperature": 0.8}
    (tmp_path / SAMPLES_FILE).write_text(json.dumps(record) + "\n")
    shown = Page(page(read_run(tmp_path)))
    assert f"Enter {HOSTILE}" in shown.visible
    assert "generated at step 40, temperature 0.8" in shown.visible
    assert shown.tags.count("script") == 4
