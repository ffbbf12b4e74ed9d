"""What `tools.evaluate` says of models that predict masked tokens is the objective's definition, and the run's own figure."""

import json
import math
import shutil
from collections import defaultdict

import numpy as np
import pytest
import torch

from model.llama import Llama
from tests.data_prep.texts import PROSE
from tests.model.tiny import formula, tiny
from tests.tools.called import call
from tests.tools.test_report import Page
from tests.tools.trained import MASKED, packed
from tools import evaluate
from tools.evaluation.files import read_evaluations
from tools.evaluation.long_context import measure
from tools.report import page
from tools.run_history import read_run
from training.data import make_batch
from training.objective import Masking
from training.records import read_records
from training.scores import scores
from training.sections import ObjectiveConfig

TOKENS, CHUNK = 24, 6
CHUNKED = {"attention": "chunked", "chunk_size": CHUNK}
OBJECTIVES = {
    "fixed": ({"name": "masked", "mask_ratio": 0.4}, {}),
    "bound": ({"name": "masked", "mask_ratio": (0.0, 1.0)}, {}),
    "chunks": ({"name": "masked", "mask_ratio": (0.0, 1.0)}, CHUNKED),
    "diffusion": ({"name": "block_diffusion"}, CHUNKED),
    "learned": ({"name": "block_diffusion"}, CHUNKED | {"position_embedding": "learned"}),
}


@pytest.fixture(scope="module")
def dataset(tokenizer, tmp_path_factory):
    """Rows of 24 tokens: pieces of long documents that overlap by 5, and short documents together in a row."""
    texts = [PROSE[2][:900], *(text[:18] for text in PROSE[3:15])]
    return packed(texts, tokenizer, tmp_path_factory.mktemp("masked"), seq_length=TOKENS, overlap=5)


def definition(model, dataset, masking):
    """Position, weighted loss and weight of every token that may be masked; each piece run alone, in float64 and with all
    scores. The noised tokens of a chunk of block diffusion are predicted from a text that ends with the chunk."""
    tokenizer, diffusion = dataset.manifest.tokenizer, masking.objective.copies == 2
    control = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id}
    for number in range(len(dataset)):
        row = dataset.row(dataset.sources[0], number)
        clean = torch.from_numpy(row.ids[:TOKENS].astype(np.int64))
        batch = make_batch(dataset, np.array([0]), np.array([number]))
        masked = masking(batch, np.array([number]))
        noised, inverse_share = masked["input_ids"][0, :TOKENS], masked["target_weights"][0].double()
        start = 0
        for length, context in zip(row.seg_len.tolist(), row.seg_ctx.tolist(), strict=True):
            last = min(start + length, TOKENS)
            firsts = range(start, last, CHUNK if diffusion else TOKENS)
            for first in firsts:
                end = min(first + CHUNK, last) if diffusion else last
                text = torch.cat([clean[start:first], noised[first:end]])
                with torch.no_grad():
                    log_p = model(text.unsqueeze(0))[0].log_softmax(-1)
                for at in range(first, end):
                    if at - start < max(1, context) or int(clean[at]) in control:
                        assert noised[at] == clean[at]
                        continue
                    nll, hidden = -float(log_p[at - start, clean[at]]), noised[at] == masking.mask_id
                    yield at - start, float(inverse_share[at]) * nll if hidden else 0.0, bool(hidden)
            start += length


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_figure_is_its_definition(name, dataset):
    objective, changes = OBJECTIVES[name]
    model = Llama(tiny(vocab_size=600, num_hidden_layers=1, is_causal=False, **changes), seed=3).double().eval()
    masking = Masking(ObjectiveConfig(**objective), model.config, dataset.manifest, 0, "validation")
    found = measure(model, dataset, dataset.sources[0], batch_samples=5, masking=masking)
    for layer in model.layers:
        layer.self_attn.attend = formula
    tokens = list(definition(model, dataset, masking))
    if name == "fixed":  # the mean over the masked tokens
        tokens = [token for token in tokens if token[2]]
    assert 40 < sum(hidden for *_, hidden in tokens) < 0.8 * len(list(definition(model, dataset, masking)))
    bound = math.fsum(loss for _, loss, _ in tokens) / len(tokens)
    result = scores(dataset, found.full.total, found.full.targets, masking=masking)
    assert (result["targets"], result["loss"]) == (len(tokens), pytest.approx(bound, rel=1e-10))
    if name == "fixed":
        assert "bits_per_byte" not in result
    else:
        (source,) = dataset.manifest.splits["train"].values()
        per_byte = (source.tokens - 2 * source.documents) / source.bytes  # neither the first token nor the last, EOS
        assert result["bits_per_byte"] == pytest.approx(bound / math.log(2) * per_byte, rel=1e-10)
    buckets = defaultdict(list)
    for place, loss, _ in tokens:
        buckets[place.bit_length() - 1].append(loss)
    rows = {row["first"]: (row["loss"], row["targets"]) for row in found.full.by_position("loss")}
    assert rows == {
        2**k: (pytest.approx(math.fsum(losses) / len(losses), rel=1e-10, abs=1e-12), len(losses))
        for k, losses in buckets.items()
    }


def test_the_bound_of_a_model_that_knows_nothing_is_its_entropy(dataset):
    """All weights 0: every prediction costs log V, and the shares of masks cancel on average."""
    config = tiny(vocab_size=600, num_hidden_layers=1, is_causal=False, **CHUNKED)
    model = Llama(config).eval()
    torch.nn.init.zeros_(model.lm_head.weight)
    for name in ("bound", "diffusion"):
        losses = []
        for seed in range(8):
            masking = Masking(ObjectiveConfig(**OBJECTIVES[name][0]), config, dataset.manifest, seed, "validation")
            full = measure(model, dataset, dataset.sources[0], batch_samples=16, masking=masking).full
            losses.append(full.total / full.targets)
        assert np.mean(losses) == pytest.approx(math.log(600), rel=0.1)


@pytest.fixture
def command(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    return lambda *arguments: call(evaluate.main, capsys, monkeypatch, "--device", "cpu", *arguments)


@pytest.mark.parametrize("name", MASKED)
def test_it_is_the_validation_loss_that_the_run_logged(trained, masked_exports, command, tmp_path, name):
    run, file = trained.folder / name, tmp_path / "figures.json"
    validations = {r["step"]: r["validation"] for r in read_records(run / "metrics.jsonl") if "validation" in r}
    for source, step, *more in ((run, 4), (run, 2, "--step", 2), (masked_exports[name], 4, "--batch-samples", 7)):
        done = command(source, "--data", trained.data, "--json", file, *more)
        assert (done.code, done.err) == (0, "")
        found = json.loads(file.read_text())
        result = found["scores"]
        assert result["all"] == pytest.approx(validations[step]["validation"], rel=1e-5)
        assert ("bits_per_byte" in result["all"]) == (name == "diffusion")
        assert result["plays"]["targets"] + result["topics"]["targets"] == result["all"]["targets"]
        for key, row in result.items():
            buckets = found["positions"][key]
            assert sum(bucket["targets"] for bucket in buckets) == row["targets"]
            assert sum(b["targets"] * b["loss"] for b in buckets) == pytest.approx(row["targets"] * row["loss"])
        assert ObjectiveConfig(**found["objective"]).drawn == (name == "diffusion")
        assert {"masked": "loss of masked tokens", "diffusion": "bound"}[name] in done.out
    assert {each["checkpoint"] for each in read_evaluations(run)} == {"step-00000002", "step-00000004"}
    assert "step-00000004" in Page(page(read_run(run))).visible


def test_what_asks_for_the_next_token_is_refused(trained, masked_exports, command, tmp_path):
    data = "--data", trained.data
    for flag in ("--context-gain", "--passkey"):
        done = command(trained.folder / "masked", *data, flag)
        said = f"{flag} is for models that predict the next token; masked/step-00000004 predicts masked ones"
        assert (done.code, done.err) == (2, f"error: {said}\n")
    file = shutil.copytree(masked_exports["masked"], tmp_path / "export") / "config.json"
    config = json.loads(file.read_text())
    for change, said in (
        ({"objective": None}, "config.json has no objective, which says how tokens are masked"),
        ({"objective": {"name": "masked", "mask_ratio": 2}}, "config.json: objective: Value error, mask_ratio 2.0"),
    ):
        file.write_text(json.dumps(config | change))
        done = command(file.parent, *data)
        assert (done.code, done.err.count("\n")) == (2, 1)
        assert said in done.err


def test_the_batch_does_not_enter(dataset):
    """Rows are masked as they are numbered in the split."""
    config = tiny(vocab_size=600, num_hidden_layers=1, is_causal=False)
    masking = Masking(ObjectiveConfig(name="masked"), config, dataset.manifest, 0, "validation")
    whole, alone = (
        measure(Llama(config).eval(), dataset, dataset.sources[0], batch_samples=size, masking=masking).full
        for size in (64, 1)
    )
    assert whole.targets == alone.targets
    assert whole.total == pytest.approx(alone.total, rel=1e-5)
