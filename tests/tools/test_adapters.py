"""A run with adapters in the hands of its user: exported for PEFT or merged, evaluated and asked to write."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.checkpoint.folder import find
from engine.run.initial_weights import open_source
from model import generation
from model.adapter_config import AdaptersConfig
from model.config import ModelConfig
from model.documents import Documents
from model.llama import Llama
from model.loss import IGNORED, linear_cross_entropy
from storage.shards import open_split
from tests.tools.called import call
from tests.tools.trained import RECIPE
from tools import evaluate, export, generate
from tools.trained import load_checkpoint
from training.data import make_batch
from training.records import read_records
from training.state import PriorState

NAMES = ("plays", "topics")


@pytest.fixture(scope="module")
def run(trained):
    return trained.folder / "adapters"


@pytest.fixture(scope="module")
def live(trained) -> Llama:
    """What the engine held at the end, on the base that follows from the seed."""
    adapters = AdaptersConfig(names=NAMES, r=4, target_modules=("q_proj", "up_proj"))
    model = Llama(ModelConfig(**RECIPE["model"], tie_word_embeddings=True, adapters=adapters), seed=5)
    state = {name: torch.from_numpy(value) for name, value in trained.weights["adapters"].items()}
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    assert all(state[name].any() for name in state)
    return model


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(RECIPE["model"]["vocab_size"], (2, 30), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def command(capsys, monkeypatch):
    return lambda tool, *words: call(tool.main, capsys, monkeypatch, *words)


def exported(command, run, output, how: str | None):
    flags = () if how is None else ("--adapters", how)
    return command(export, run, "--output", output, "--dtype", "float32", *flags)


def test_separate_adapters_are_pefts(command, run, live, ids, tmp_path):
    done = exported(command, run, tmp_path / "out", "separate")
    assert done.code == 0, done.err
    for number, name in enumerate(NAMES):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "out/base", dtype=torch.float32)
        theirs = PeftModel.from_pretrained(base, tmp_path / "out" / name)
        assert theirs.peft_config["default"].base_model_name_or_path == str(tmp_path / "out/base")
        expected = live(ids, adapters=torch.full((2,), number))
        torch.testing.assert_close(theirs(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "out/base")
    assert "PeftModel" in (tmp_path / "out/README.md").read_text()


def test_a_merged_adapter_is_an_ordinary_model_and_scores_alike(command, run, live, ids, trained, tmp_path):
    done = exported(command, run, tmp_path / "out", "merged:plays")
    assert done.code == 0, done.err
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(theirs(ids).logits, live(ids, adapters=ids[:, 0] * 0), atol=1e-5, rtol=1e-5)
    scores = []
    for source in ([run, "--adapter", "plays"], [tmp_path / "out"]):
        done = command(evaluate, *source, "--data", trained.data, "--json", tmp_path / "scores")
        assert done.code == 0, done.err
        scores.append(json.loads((tmp_path / "scores").read_text())["scores"])
    assert scores[0].keys() == scores[1].keys() >= set(NAMES)
    for source, mine in scores[0].items():
        assert mine["loss"] == pytest.approx(scores[1][source]["loss"], rel=1e-5)


def test_no_document_costs_more_than_its_best_adapter_and_a_place_in_the_prior(command, run, trained, tmp_path):
    """Of the validation documents, in float64, and the command's figures are those."""
    model = load_checkpoint(*find(run), torch.float64, "cpu", None)
    dataset, entropy = (
        open_split(trained.data, "validation"),
        partial(linear_cross_entropy, weight=model.lm_head.weight),
    )
    documents_seen, scores = 0, {}
    for number, source in enumerate(dataset.sources):
        rows = np.arange(dataset.rows_per_source[source])
        batch = make_batch(dataset, np.full(len(rows), number), rows)

        def losses(adapter: int | None, batch=batch) -> torch.Tensor:
            documents = Documents.from_position_ids(batch["position_ids"])
            rows = len(batch["input_ids"])
            documents.route(None if adapter is None else torch.full((rows,), adapter), 2)
            hidden = model.hidden_states(batch["input_ids"], documents)
            return model.lm_head.loss.of_tokens(entropy, hidden, documents, batch["targets"])

        with torch.no_grad():
            mixture, *members = (losses(adapter) for adapter in (None, 0, 1))
        lengths = Documents.from_position_ids(batch["position_ids"]).lengths
        of_mixture, *of_members = (
            torch.stack([d.sum() for d in each.flatten().split(lengths)]) for each in (mixture, *members)
        )
        assert (of_mixture <= torch.stack(of_members).min(0).values + np.log(2) + 1e-9).all()
        documents_seen += len(lengths)
        scores[source] = float(mixture.sum()) / batch["num_targets"]
    assert documents_seen > 10
    done = command(evaluate, run, "--data", trained.data, "--adapter", "mixture", "--json", tmp_path / "scores")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "scores").read_text())["scores"]
    assert {source: found[source]["loss"] for source in scores} == pytest.approx(scores, rel=1e-5)


def test_a_learned_prior_mixes_where_the_run_is_used(run):
    folder, manifest = find(run)
    state = PriorState(logits=[[0.0, float(np.log(3))]], exp_avg=[[0, 0]], exp_avg_sq=[[0, 0]], step=1)
    model = load_checkpoint(folder, manifest.model_copy(update={"prior": state}), torch.float32, "cpu", None)
    assert model.lm_head.loss.prior.table[0] == pytest.approx([0.25, 0.75])
    assert load_checkpoint(folder, manifest, torch.float32, "cpu", None).lm_head.loss.prior.table[0] == [0.5, 0.5]


@pytest.fixture(scope="module")
def mixture(run, tmp_path_factory):
    output = tmp_path_factory.mktemp("exports") / "mixture"
    checkpoint, manifest = find(run)
    form = export.form_of("mixture", checkpoint, manifest)
    export.export(run, checkpoint, manifest, output, torch.float32, 10**9, form)
    return output


def test_a_mixture_is_one_folder_for_plain_transformers(mixture, run, ids):
    theirs = AutoModelForCausalLM.from_pretrained(mixture, trust_remote_code=True, dtype=torch.float32)
    ours = load_checkpoint(*find(run), torch.float32, "cpu", None)
    targets = torch.cat([ids[:, 1:], ids.new_full((2, 1), IGNORED)], 1)
    with torch.no_grad():
        expected = ours(ids, targets=targets)[1][0] / (targets != IGNORED).sum()
        assert float(theirs(ids, labels=ids).loss) == pytest.approx(float(expected), rel=1e-5)
    greedy = list(generation.generate(ours, ids[:1], 10, temperature=0))
    assert theirs.generate(ids[:1], max_new_tokens=10, do_sample=False)[0, 30:].tolist() == greedy
    assert AutoTokenizer.from_pretrained(mixture, trust_remote_code=True)("Enter").input_ids
    card = (mixture / "README.md").read_text()
    assert card.count("trust_remote_code=True") == 2
    assert "plays (0.5), topics (0.5)" in card


def test_a_mixture_is_opened_again(command, mixture, run, trained, tmp_path):
    found = []
    for source in ([run, "--adapter", "mixture"], [mixture]):
        done = command(evaluate, *source, "--data", trained.data, "--json", tmp_path / "scores")
        assert done.code == 0, done.err
        scores = json.loads((tmp_path / "scores").read_text())["scores"]
        written = command(generate, *source, "--prompt", "Enter", "--max-new-tokens", "9", "--seed", "1")
        assert written.code == 0, written.err
        found.append(({name: row["loss"] for name, row in scores.items()}, written.out))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert found[0][1] == found[1][1]
    with pytest.raises(ValueError, match="is a mixture of adapters: start from an export"):
        open_source(str(mixture), full=True)


def test_the_base_writes_too(command, run):
    words = ["--prompt", "Enter", "--max-new-tokens", "3", "--seed", "1"]
    texts = [command(generate, run, *words, "--adapter", name) for name in ("base", "plays=0.5,topics=0.5", "mixture")]
    texts.append(command(generate, run, *words, "--adapter", "mixture", "--one-member"))
    for done in texts:
        assert done.code == 0, done.err
        assert done.out.startswith("Enter")
    done = command(generate, run, *words, "--adapter", "plays", "--one-member")
    assert (done.code, "one member can be drawn from a mixture of adapters" in done.err) == (2, True)


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        (
            None,
            "this run has the adapters plays, topics: say with --adapters what to make of them: separate, merged:plays, "
            "merged:plays=0.5,topics=0.5 or mixture",
        ),
        ("merged:poems", "'poems' is not one of plays, topics"),
        ("merged:plays=much", "the share 'much' of plays is not a number"),
        ("merged:plays,plays", "is named twice"),
    ],
)
def test_what_to_export_has_to_be_said(command, run, tmp_path, how, sentence):
    done = exported(command, run, tmp_path / "out", how)
    assert done.code == 2
    assert sentence in done.err
    assert not any(tmp_path.iterdir())


def test_other_runs_have_no_adapters(command, trained, tmp_path):
    done = exported(command, trained.folder / "zero2", tmp_path / "out", "separate")
    assert done.code == 2
    assert "this run has no adapters: leave it out" in done.err
    done = command(generate, trained.folder / "zero2", "--prompt", "x", "--adapter", "plays")
    assert "this run has no adapters: leave it out" in done.err


def test_metrics_have_the_loss_of_each_adapter(run):
    steps = [record for record in read_records(run / "metrics.jsonl") if "loss" in record]
    assert steps
    for step in steps:
        assert step["adapter_losses"].keys() <= set(NAMES)
        assert (
            min(step["adapter_losses"].values()) - 1e-6 <= step["loss"] <= max(step["adapter_losses"].values()) + 1e-6
        )
        assert np.isfinite(list(step["adapter_losses"].values())).all()
