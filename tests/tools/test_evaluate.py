"""`tools.evaluate` gives the run's own validation loss, which is the loss that `transformers` computes.

What it says about long documents is tested in test_long_context.py and test_passkey.py; here, the command that says it.
"""

import json
import math
import shutil
from typing import Any

import pytest
import tokenizers
import torch
from transformers import AutoModelForCausalLM

from data_prep.tokenizer import open_tokenizer
from data_prep.tokenizer_training import train
from model.config import ModelConfig
from model.hf.weights import save_hf
from model.llama import Llama
from tests.data_prep.texts import PROSE
from tests.forks import run_python
from tests.tools.called import call
from tests.tools.test_report import Page
from tests.tools.trained import build_data, export_to, write_documents
from tools import evaluate
from tools.evaluation.files import read_evaluations
from tools.hf_tokenizer import write_hf_tokenizer
from tools.report import page
from tools.run_history import read_run
from training.records import read_records

ANALYSES = {"scores", "positions", "context_gain", "passkey"}


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    return export_to(trained.folder / "zero2", tmp_path_factory.mktemp("exported") / "hf", "float32")


@pytest.fixture
def command(capsys, monkeypatch):
    return lambda *arguments: call(evaluate.main, capsys, monkeypatch, "--device", "cpu", *arguments)


@pytest.fixture
def figures(command, tmp_path):
    def evaluated(*arguments) -> dict[str, Any]:
        done = command(*arguments, "--json", tmp_path / "figures.json")
        assert (done.code, done.err) == (0, "")
        return json.loads((tmp_path / "figures.json").read_text())

    return evaluated


def logged(trained, name: str, step: int) -> dict[str, float]:
    records = read_records(trained.folder / name / "metrics.jsonl")
    (found,) = [r["validation"]["validation"] for r in records if "validation" in r and r["step"] == step]
    return found


@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "pipeline", "sequence2", "tensor2"])
def test_it_is_the_loss_that_the_run_logged(trained, figures, name, step):
    found = figures(trained.folder / name, "--data", trained.data, "--step", step)
    result = found["scores"]
    assert result.keys() == {"plays", "topics", "all"}
    told = logged(trained, name, step)
    by_source = {source: row["loss"] for source, row in result.items() if source != "all"}
    assert by_source == pytest.approx(told.pop("loss_by_source"), rel=1e-5)
    assert result["all"] == pytest.approx(told, rel=1e-5)
    assert result["all"].keys() == {"loss", "perplexity", "bits_per_byte", "targets"}
    parts = result["plays"], result["topics"]
    assert sum(part["targets"] for part in parts) == result["all"]["targets"]
    assert sum(part["targets"] * part["loss"] for part in parts) == pytest.approx(
        result["all"]["targets"] * result["all"]["loss"]
    )
    for source, row in result.items():
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        buckets = found["positions"][source]
        assert sum(bucket["targets"] for bucket in buckets) == row["targets"]
        assert sum(bucket["targets"] * bucket["loss"] for bucket in buckets) == pytest.approx(
            row["targets"] * row["loss"], rel=1e-12
        )
        assert buckets[0]["first"] == 1
        assert buckets[-1]["last"] == 96


def test_a_run_and_its_export_and_any_batch_size_agree(trained, exported, figures, tmp_path):
    more = ["--context-gain", "--passkey", "--passkey-lengths", 128, "--passkey-trials", 1, "--passkey-depths", 2]
    expected = figures(trained.folder / "zero2", "--data", trained.data, *more)
    longer = shutil.copytree(exported, tmp_path / "longer")  # an export has positions for the rows of its training, 96
    config = json.loads((longer / "config.json").read_text())
    (longer / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 128}))
    found = figures(longer, "--data", trained.data, *more)
    for name in ("scores", "positions", "context_gain", "passkey"):
        assert found[name] == expected[name]
    assert not (exported / "evaluations").exists()
    batched = figures(exported, "--data", trained.data, "--batch-samples", "7")
    assert batched["scores"]["all"] == pytest.approx(expected["scores"]["all"], rel=1e-6)
    assert "context_gain" not in batched
    assert "passkey" not in batched


def test_the_command_measures_the_use_of_length_and_keeps_it(trained, figures):
    run = trained.folder / "zero3"
    gain = ["--context-gain", "--context-limits", 96, 16, 16]
    keys = ["--passkey", "--passkey-lengths", 128, 120, "--passkey-depths", 3, "--passkey-trials", 2, "--seed", 5]
    found = figures(run, "--data", trained.data, *gain, *keys)
    assert found["model"] == "zero3/step-00000004"
    for source in ("plays", "topics", "all"):
        cut, whole = found["context_gain"][source]
        assert (cut["limit"], whole["limit"]) == (16, 96)
        assert whole["gain"] == 0
        assert whole["loss"] == pytest.approx(found["scores"][source]["loss"], rel=1e-12)
        assert cut["loss"] - cut["gain"] == pytest.approx(whole["loss"], rel=1e-9)
        assert [row["targets"] for row in cut["positions"]] == [row["targets"] for row in found["positions"][source]]
    cells = [(cell["length"], cell["depth"]) for cell in found["passkey"]["cells"]]
    assert cells == [(length, depth) for length in (120, 128) for depth in (0, 0.5, 1)]
    assert found["passkey"]["language"] == "en"
    assert found["passkey"]["seed"] == 5

    figures(run, "--data", trained.data, "--step", 2)
    figures(run, "--data", trained.data, "--max-samples", 1)
    kept = {(each["checkpoint"], name): each for each in read_evaluations(run) for name in each.keys() & ANALYSES}
    assert kept.keys() == {("step-00000002", name) for name in ("scores", "positions")} | {
        ("step-00000004", name) for name in ANALYSES
    }
    assert kept["step-00000004", "scores"]["max_samples"] == 1
    for name in ("context_gain", "passkey"):  # not what the last call measured
        assert kept["step-00000004", name][name] == found[name]
        assert kept["step-00000004", name]["max_samples"] is None
    assert "step-00000004" in Page(page(read_run(run))).visible


def test_it_is_the_loss_of_transformers_document_by_document(tokenizer, exported, tmp_path, figures):
    texts = [text[:120] for text in PROSE[:12]]  # every one of them fits into a row
    source = write_documents(tmp_path / "short.jsonl", texts)
    data = build_data([f"short={source}"], tokenizer, tmp_path / "data", seq_length=128, validation_fraction=0)
    model, opened = AutoModelForCausalLM.from_pretrained(exported), open_tokenizer(tokenizer)
    total, targets = 0.0, 0
    for ids in opened.encode_batch(texts):
        document = torch.tensor([[opened.bos_id, *ids.tolist(), opened.eos_id]])
        assert document.shape[1] <= 129
        with torch.no_grad():
            total += float(model(document, labels=document).loss) * (document.shape[1] - 1)
        targets += document.shape[1] - 1
    result = figures(exported, "--data", data, "--split", "train")["scores"]["short"]
    assert result["targets"] == targets
    assert result["loss"] == pytest.approx(total / targets, rel=1e-5)
    size = sum(len(text.encode()) for text in texts)
    assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-5)


def test_the_table_and_a_part_of_the_rows(trained):
    arguments = ["--data", trained.data, "--max-samples", "2", "--context-gain", "--passkey", "--passkey-trials", "1"]
    arguments += ["--passkey-lengths", "128"]
    words = ["-m", "tools.evaluate", trained.folder / "zero2", *arguments]
    done = run_python(words, env={"COLUMNS": "200"})
    assert done.returncode == 0, done.stderr
    assert all(" %  " in line for line in done.stderr.splitlines())  # progress, on a slow machine
    assert "zero2/step-00000004" in done.stdout
    rows = {cells[1].strip(): cells for line in done.stdout.splitlines() if len(cells := line.split("│")) == 7}
    assert rows.keys() >= {"plays", "topics", "all", "1", "64 - 96"}
    for title in (
        "loss by position (nats)",
        "gain from context (nats a target)",
        "forced choice among 10 (chance 0.10)",
    ):
        assert title in done.stdout
    assert int(rows["plays"][5].replace(",", "")) <= 2 * 96


def test_the_export_of_a_foreign_tokenizer_belongs_to_its_data(tmp_path, figures, command):
    """Whoever saves the tokenizer.json of an export anew still has it: it is recognised by what it does."""
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(PROSE[:20], vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False)
    (tmp_path / "tokenizer").mkdir()
    trained.save(str(tmp_path / "tokenizer/tokenizer.json"))
    documents = write_documents(tmp_path / "documents.jsonl", PROSE[:8])
    build = {"seq_length": 64, "validation_fraction": 0.2}
    data = build_data([f"topics={documents}"], tmp_path / "tokenizer", tmp_path / "data", **build)
    config = ModelConfig(vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    save_hf(config, Llama(config, seed=0).state_dict().items(), tmp_path / "hf")
    source = tmp_path / "data/tokenizer/tokenizer.json"
    write_hf_tokenizer(open_tokenizer(source).info("tokenizer/tokenizer.json"), source, tmp_path / "hf", 64)
    table = json.loads((tmp_path / "hf/tokenizer.json").read_text())
    (tmp_path / "hf/tokenizer.json").write_text(json.dumps(table))
    assert source.read_bytes() != (tmp_path / "hf/tokenizer.json").read_bytes()
    assert figures(tmp_path / "hf", "--data", data)["scores"]["topics"]["loss"] == pytest.approx(math.log(300), abs=0.1)
    table["model"]["merges"].pop()
    (tmp_path / "hf/tokenizer.json").write_text(json.dumps(table))
    assert "another tokenizer" in command(tmp_path / "hf", "--data", data).err


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--data", "{other}"], "{other} was built with another tokenizer than {run}: build it with that one"),
        (["--data", "{data}", "--split", "test"], "{data} has no split 'test': it has train, validation"),
        (["--data", "{run}"], "{run} is not a prepared data set"),
        (["--data", "{data}", "--step", "5"], "{run} has no checkpoint of step 5; there are: 2, 4"),
        (["--data", "{data}", "--max-samples", "-1"], "--batch-samples and --max-samples must be at least 1"),
        (["--data", "{data}", "--batch-samples", "0"], "--batch-samples and --max-samples must be at least 1"),
        (
            ["--data", "{data}", "--json", "{run}/none/figures.json"],
            "--json {run}/none/figures.json: there is no such folder",
        ),
        (["--data", "{data}", "--context-limits", "8"], "--context-limits has no effect without --context-gain"),
        (
            ["--data", "{data}", "--context-gain", "--context-limits", "8", "0"],
            "--context-limits 0: must be at least 1",
        ),
        (["--data", "{data}", "--passkey-lengths", "128"], "--passkey-lengths has no effect without --passkey"),
        (
            ["--data", "{data}", "--passkey", "--passkey-lengths", "129"],
            "--passkey-lengths 129: the model has positions for 128",
        ),
        (["--data", "{data}", "--passkey"], "a text of 96 tokens has no room for a pass key, which takes 1"),
        (
            ["--data", "{data}", "--passkey", "--passkey-depths", "1"],
            "--passkey-depths and --passkey-candidates must be",
        ),
        (["--data", "{data}", "--seed", "-1"], "--seed -1: must not be negative"),
        (["--data", "{data}", "--device", "cuda:9"], "--device cuda:9 cannot be used here"),
    ],
)
def test_bad_input_is_one_sentence(trained, other_data, command, flags, sentence):
    names = {"other": other_data, "data": trained.data, "run": trained.folder / "zero2"}
    done = command(names["run"], *(flag.format(**names) for flag in flags))
    assert done.code == 2
    assert done.err.startswith(f"error: {sentence.format(**names)}")
    assert done.err.count("\n") == 1


@pytest.fixture(scope="module")
def other_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    (folder / "tokenizer.model").write_bytes(train(PROSE[40:60], 600))
    documents = write_documents(folder / "documents.jsonl", PROSE[:8])
    build = {"seq_length": 64, "validation_fraction": 0.2}
    return build_data([f"topics={documents}"], folder / "tokenizer.model", folder / "data", **build)
