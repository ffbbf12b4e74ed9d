"""Merging a run's adapters from the command line: the written model costs what is shown, weights are learned elsewhere."""

import re

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from engine.checkpoint.folder import find
from model.merge_ways import WAYS
from storage.shards import open_split
from tests.tools.called import call
from tools import merge
from tools.evaluation.domains import Sample, bits_per_byte, open_adapted
from tools.evaluation.learned_shares import learned_shares
from tools.trained import open_trained


@pytest.fixture(scope="module")
def run(trained):
    return trained.folder / "adapters"


@pytest.fixture
def merging(run, trained, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    return lambda *words: call(merge.main, capsys, monkeypatch, run, "--data", trained.data, *words)


def rows(shown: str) -> dict[str, list[float]]:
    cells = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in shown.splitlines()]
    return {row[0]: [float(cell) for cell in row[1:]] for row in cells if len(row) > 1 and row[1][:1].isdigit()}


def test_the_written_model_costs_what_was_shown(merging, trained, tmp_path):
    done = merging("--method", "ties", "--density", "0.4", "--output", tmp_path / "out", "--dtype", "float32")
    assert done.code == 0, done.err
    shown = rows(done.out)
    assert list(shown) == ["base", "plays", "topics", "mixture g=0", "mixture g=1", *WAYS]
    dataset = open_split(trained.data, "validation")
    found = bits_per_byte(open_trained(str(tmp_path / "out"), None, "cpu", "float32").model, dataset)
    assert list(found.values()) == pytest.approx(shown["ties"], abs=6e-5)
    card = (tmp_path / "out/README.md").read_text()
    assert "PEFT's way `ties` with the weights plays 1, topics 1, density 0.4, signs by total" in card
    assert f"| base | {shown['base'][0]:.4f} |" in card
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_merged_adapter_is_pefts_too(merging, tmp_path):
    words = [
        "--max-samples",
        "1",
        "--method",
        "svd",
        "--rank",
        "3",
        "--weights",
        "plays=0.8,topics=0.1",
        "--dtype",
        "float32",
    ]
    for name, flags in (("model", []), ("peft", ["--peft"])):
        done = merging(*words, *flags, "--output", tmp_path / name)
        assert done.code == 0, done.err
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "peft/base", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "peft/merged")
    assert theirs.peft_config["default"].r == 3
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32), torch.arange(40)[None]
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert "PEFT's way `svd` with the weights plays 0.8, topics 0.1." in (tmp_path / "peft/README.md").read_text()


def test_learned_weights_are_measured_where_they_were_not_learned(merging, run, trained):
    done = merging("--split", "train", "--max-samples", "12", "--learn-weights", "adapter")
    assert done.code == 0, done.err
    *_, learned = (shown := rows(done.out))
    assert learned.startswith("cat, plays")
    assert "all is measured on the others" in done.out
    adapted, dataset = open_adapted(*find(run), torch.float32, "cpu"), open_split(trained.data, "train")
    other = bits_per_byte(adapted.model(), dataset, Sample(12, 1))
    assert list(other.values()) == pytest.approx(shown["base"], abs=6e-5)


def test_learning_lowers_the_cost_where_it_is_done(run, trained):
    adapted, dataset, sample = (
        open_adapted(*find(run), torch.float32, "cpu"),
        open_split(trained.data, "train"),
        Sample(6, 0),
    )
    start = {"plays": 0.5, "topics": 0.5}
    costs = [bits_per_byte(adapted.merged("cat", start), dataset, sample)["mean"]]
    for by_layer in (False, True):
        shares = learned_shares(adapted, dataset, sample, start, by_layer)
        assert {share.shape for share in shares.values()} == {(2,) if by_layer else ()}
        costs.append(bits_per_byte(adapted.merged("cat", shares), dataset, sample)["mean"])
    assert costs[0] > max(costs[1:])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--method", "ties"], "--method and --output belong together"),
        (["--peft"], "--peft has no effect without --output"),
        (["--learn-weights", "layer", "--method", "svd", "--output", "new"], "learns those of cat, not of svd"),
        (["--density", "0"], "--density 0: above 0, at most 1"),
        (["--weights", "poems=1"], "'poems' is not one of plays, topics"),
        (["--learn-weights", "adapter"], "source plays has one document"),
        (["--split", "test"], "test"),
    ],
)
def test_what_cannot_be_is_said(merging, words, sentence):
    done = merging(*words)
    assert done.code == 2
    assert sentence in done.err


def test_runs_without_adapters_have_nothing_to_merge(trained, capsys, monkeypatch):
    done = call(merge.main, capsys, monkeypatch, trained.folder / "zero2", "--data", trained.data)
    assert "this run has no adapters" in done.err
