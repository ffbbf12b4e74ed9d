"""The report holds what the run logged, needs nothing but itself, and copes with runs that are not over."""

import base64
import gzip
import hashlib
import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
from plotly.offline import get_plotlyjs

from tests.processes import run_cli
from tests.training.test_metrics import log, open_logger
from tools.evaluation.files import store_evaluation
from tools.report import main, page
from tools.run_history import read_run
from training.goodput import GOODPUT_FILE, KINDS, LaunchTimes, RunTimes
from training.metrics import METRICS_FILE
from training.throughput import Rates

MODEL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
HOSTILE = "</script><script>alert('&')</script>"
FACTS = {
    "recipe": {"optimizer": {"lr": 3e-4}, "model": MODEL},
    "ds_config": {"zero_optimization": {"stage": 3}},
    "layout": {"world_size": 8, "pipeline": 1, "tensor": 2, "sequence": 1},
    "environment": {
        "host": HOSTILE,
        "devices": ["Fast GPU", "Fast GPU"],
        "git": {"commit": "c0ffee0123456789", "branch": "main", "dirty": True},
    },
}


class Page(HTMLParser):
    """The text of each element that has an id, all attributes, and the text outside of scripts and styles."""

    def __init__(self, text: str):
        super().__init__()
        self.by_id, self.attributes, self.tags, self.visible = {}, [], [], ""
        self._id, self._raw = None, False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]
        self._id, self._raw = dict(attrs).get("id"), tag in ("script", "style")

    def handle_endtag(self, tag):
        self._raw = False

    def handle_data(self, data):
        if self._id and data.strip():
            self.by_id.setdefault(self._id, data)
        if not self._raw:
            self.visible += data

    def figure(self, name: str = "figure", layout: str = "wide") -> go.Figure:
        found = json.loads(self.by_id[name])
        return go.Figure(found["data"], found["layouts"][layout])  # validates every property


def write_run(folder: Path, last_step: int = 40, total_steps: int = 40) -> Path:
    with open_logger(folder, total_steps=total_steps) as logger:
        for step in range(5, last_step + 1, 5):
            loss = math.nan if step == 20 else 5 - step / 20
            log(logger, step, loss=loss, objective=loss + 0.5, rates=Rates(31_250.0, 0.412, 0.003, 0.5))
            if step == 20:
                logger.log_event(step, "skip", reason=HOSTILE)
        logger.log_validation(20, {"books": {"loss": 4.5, "bits_per_byte": 1.5, "targets": 10}})
        logger.log_event(20, "checkpoint", name="step-00000020")
        logger.log_event(20, "resume", world_size=2)
        logger.log_validation(last_step, {"books": {"loss": 4.0, "bits_per_byte": 1.25, "targets": 10}})
    (folder / "run.json").write_text(json.dumps(FACTS))
    return folder


def write_evaluations(folder: Path, checkpoint: str = "step-00000040", data: str = "/somewhere/books") -> None:
    """All analyses of two sources, the figures being different for every checkpoint."""
    step = int(checkpoint.removeprefix("step-"))
    spread = {"standard_error": 0.25, "targets": 1000}
    buckets = [{"first": 1, "last": 1}, {"first": 2, "last": 3}, {"first": 4, "last": 6}]
    by_position = [bucket | {"loss": 5 - step / 80 - place} | spread for place, bucket in enumerate(buckets)]
    gains = [
        bucket | {"gain": 0.5 * place, "standard_error": None, "targets": 9} for place, bucket in enumerate(buckets)
    ]
    gain = {"limit": 1, "loss": 5.0, "gain": step / 80, "standard_error": 0.01, "positions": gains}
    cells = [
        {"length": length, "depth": depth, "exact_match": depth, "forced_choice": 0.1, "nll_drop": length / 1000}
        for length in (1024, 512)
        for depth in (0.0, 0.5, 1.0)
    ]
    scored = {"loss": 4.5 - step / 80, "perplexity": 90.0, "bits_per_byte": 1.5, "targets": 12345}
    fingerprint = hashlib.sha256(data.encode()).hexdigest()
    store_evaluation(
        folder,
        {"checkpoint": checkpoint, "data": data, "fingerprint": fingerprint, "split": "validation"},
        {
            "scores": {"plays": scored, "all": scored},
            "positions": {"plays": by_position, "all": by_position},
            "context_gain": {"plays": [gain], "all": [gain]},
            "passkey": {"language": "en", "candidates": 10, "seed": 0, "trials": 5, "cells": cells},
        },
    )


def traces(figure: go.Figure) -> dict[str, go.Scatter]:
    return {trace.name: trace for trace in figure.data if trace.visible is not False}


def numbers(packed) -> np.ndarray:
    """Plotly writes arrays as base64 of their bytes, except empty ones."""
    if isinstance(packed, tuple):
        return np.array(packed)
    return np.frombuffer(base64.b64decode(packed["bdata"]), packed["dtype"])


def test_curves_and_events_are_those_of_the_run(tmp_path):
    figure = Page(page(read_run(write_run(tmp_path)))).figure()
    found = traces(figure)
    assert found.keys() >= {
        "training",
        "objective",
        "validation: books",
        "Learning rate",
        "Gradient norm before clipping",
    }
    assert found.keys() >= {"Tokens per second", "Time waiting for data", "skip", "checkpoint", "resume"}
    steps = np.arange(5, 41, 5)
    np.testing.assert_array_equal(numbers(found["training"].x), steps)
    np.testing.assert_allclose(numbers(found["training"].y), np.where(steps == 20, np.nan, 5 - steps / 20))
    np.testing.assert_allclose(numbers(found["validation: books"].y), [4.5, 4.0])
    np.testing.assert_allclose(numbers(found["Time waiting for data"].y), 0.003)
    assert [numbers(found[kind].x)[0] for kind in ("skip", "checkpoint", "resume")] == [20, 20, 20]
    assert "step-00000020" in found["checkpoint"].text[0]
    assert len(figure.layout.shapes) == 2  # the skip and the resume also cross the loss


def test_the_head_says_what_the_run_recorded(tmp_path):
    write_run(tmp_path)
    shown = Page(page(read_run(tmp_path))).visible
    parameters = 2 * 512 * 64 + 3 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    for words in (f"{parameters / 1000:.3g}k parameters, 3 layers of width 64", "ZeRO-3, 8 ranks, tensor 2",
                  "2 × Fast GPU", "c0ffee012345, with changes", "in 2 launches", "final loss3.0000"):  # fmt: skip
        assert words in shown


@pytest.mark.parametrize("key", list(FACTS))
def test_folders_that_lack_a_fact_are_shown_without_it(tmp_path, key):
    write_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({name: value for name, value in FACTS.items() if name != key}))
    assert "finished at step 40" in Page(page(read_run(tmp_path))).visible


def test_the_page_contains_everything_it_needs(tmp_path):
    shown = Page(page(read_run(write_run(tmp_path))))
    assert not {"src", "href", "srcset"} & set(shown.attributes)
    assert gzip.decompress(base64.b64decode(shown.by_id["plotly"])).decode() == get_plotlyjs()
    for text in ("finished at step 40", "optimizer.lr", "0.0003", "best books loss", "1.2500", "31.2k", "41.2%"):
        assert text in shown.visible


def test_evaluations_are_drawn_the_newest_ahead(tmp_path):
    write_run(tmp_path)
    for checkpoint in ("step-00000040", "step-00000020"):
        write_evaluations(tmp_path, checkpoint)
    shown = Page(page(read_run(tmp_path)))
    for cell in ("books validation", "step-00000020", "4.2500", "4.0000", "12,345"):
        assert cell in shown.visible
    figure = shown.figure("evaluations")
    lines = [trace for trace in figure.data if trace.type == "scatter" and "plays" in trace.name]
    assert [line.name for line in lines[:2]] == [f"plays, books validation, step-000000{n}" for n in (20, 40)]
    assert [line.visible for line in lines] == ["legendonly", True, "legendonly", True]
    assert [line.y for line in lines] == [(4.75, 3.75, 2.75), (4.5, 3.5, 2.5), (0.25,), (0.5,)]
    assert lines[0].x == (1, 2, 4)
    assert lines[0].error_y.array == (0.5, 0.5, 0.5)
    (beyond,) = [trace for trace in figure.data if trace.type == "scatter" and "chunks of 1" in trace.name]
    assert (beyond.x, beyond.y) == ((2, 4), (0.5, 1.0))  # the first chunk has nothing to gain
    exact, chosen, drop = (trace for trace in figure.data if trace.type == "heatmap")
    assert exact.x == ("512", "1,024")
    assert exact.y == ("0", "0.5", "1")
    assert list(exact.z) == [[0.0, 0.0], [0.5, 0.5], [1.0, 1.0]]
    assert list(chosen.z) == [[0.1, 0.1]] * 3
    assert list(drop.z) == [[0.512, 1.024]] * 3
    titles = " ".join(annotation.text.replace("<br>", " ") for annotation in figure.layout.annotations)
    assert "step-00000040" in titles
    assert "Forced choice among 10 (chance 0.10)" in titles


def test_every_data_set_has_its_own_heat_maps(tmp_path):
    write_run(tmp_path)
    for data in ("/here/books", "/there/books", "/there/news"):
        write_evaluations(tmp_path, data=data)
    figure = Page(page(read_run(tmp_path))).figure("evaluations")
    assert len([trace for trace in figure.data if trace.type == "heatmap"]) == 9
    assert len(list((tmp_path / "evaluations").iterdir())) == 3 * 4


def test_one_analysis_alone_is_drawn_and_none_leaves_no_section(tmp_path):
    write_run(tmp_path)
    assert Page(page(read_run(tmp_path))).by_id["evaluations"] == "null"
    write_evaluations(tmp_path)
    for file in (tmp_path / "evaluations").iterdir():
        if "passkey" not in file.name:
            file.unlink()
    figure = Page(page(read_run(tmp_path))).figure("evaluations")
    assert {trace.type for trace in figure.data} == {"heatmap"}


def write_times(folder: Path, reason: str) -> None:
    seconds = dict.fromkeys(KINDS, 0.0)
    launches = [
        LaunchTimes(began=0, heard=110, after_step=0, step=25, seconds=seconds | {"productive": 100, "start_up": 10}),
        LaunchTimes(began=130, heard=190, after_step=20, step=22, recomputed_steps=2, reason=reason,
                    seconds=seconds | {"recomputed": 50, "restart": 20, "start_up": 10}),
        LaunchTimes(began=200, heard=210, after_step=20, step=20, seconds=seconds | {"start_up": 10, "restart": 10}),
    ]  # fmt: skip
    times = RunTimes(furthest_step=25, launches=launches)
    (folder / GOODPUT_FILE).write_text(times.model_dump_json())


def test_where_the_time_went_and_why_each_launch_began(tmp_path):
    write_run(tmp_path)
    assert "goodput" not in Page(page(read_run(tmp_path))).visible
    write_times(tmp_path, reason=f"killed: {HOSTILE}")
    shown = Page(page(read_run(tmp_path)))
    for words in ("goodput47.6%", "productive 47.6%, 0:01:40", "recomputed 23.8%, 50.0 s", "restart 14.3%, 30.0 s",
                  "21–22", f"killed: {HOSTILE}", "the one before was killed or failed", "1970-01-01 00:02:10"):  # fmt: skip
        assert words in shown.visible
    assert "save stall" not in shown.visible
    assert shown.tags.count("script") == 4


def test_text_from_the_run_stays_text(tmp_path):
    folder = tmp_path / "<script>"
    folder.mkdir()
    write_run(folder)
    write_evaluations(folder, data="/somewhere/<img src=x>")
    shown = Page(page(read_run(folder)))
    assert shown.tags.count("script") == 4
    assert "img" not in shown.tags
    assert "<img src=x> validation" in shown.visible
    assert HOSTILE in shown.visible
    assert "<script>" in shown.visible


def test_a_run_in_progress_with_a_line_being_written(tmp_path):
    write_run(tmp_path, last_step=30, total_steps=120)
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 35, "loss": 3.')
    (tmp_path / "run.json").unlink()
    shown = Page(page(read_run(tmp_path)))
    assert "step 30 of 120 (25%)" in shown.visible
    assert "0:00:45 to go" in shown.visible
    assert len(numbers(traces(shown.figure())["training"].x)) == 6


def test_a_run_that_has_logged_nothing_yet(tmp_path):
    (tmp_path / METRICS_FILE).touch()
    shown = Page(page(read_run(tmp_path)))
    assert "no step logged yet" in shown.visible
    assert len(numbers(traces(shown.figure())["training"].x)) == 0


def test_command_writes_the_page_where_it_is_told(tmp_path, capsys):
    write_run(tmp_path)
    assert main([str(tmp_path)]) == 0
    assert main([str(tmp_path), "-o", str(tmp_path / "new" / "page.html")]) == 0
    assert (tmp_path / "report.html").read_bytes() == (tmp_path / "new" / "page.html").read_bytes()
    assert (tmp_path / "report.html").stat().st_size < 2.2 * 2**20
    assert str(tmp_path / "new" / "page.html") in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (METRICS_FILE, None, "metrics.jsonl does not exist: give the folder that train.py was told to write"),
        (METRICS_FILE, b'{"step"\n{"step": 2, "loss": 1.0}\n', "metrics.jsonl:1: not a record"),
        ("run.json", b"{", "run.json is not valid JSON"),
        (GOODPUT_FILE, b"{", "goodput.json cannot be read: remove it"),
        ("evaluations/step-00000001-data.json", b"{", "step-00000001-data.json is not valid JSON"),
    ],
)
def test_bad_runs_are_refused_in_one_sentence(tmp_path, capsys, file, content, message):
    write_run(tmp_path)
    (tmp_path / "evaluations").mkdir()
    (tmp_path / file).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / file).write_bytes(content)
    assert main([str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tools.report: ")
    assert message in line
    assert not (tmp_path / "report.html").exists()


def test_module_runs_as_a_command(tmp_path):
    write_run(tmp_path)
    done = run_cli(["python", "-m", "tools.report", tmp_path, "-o", tmp_path / "r.html"])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
