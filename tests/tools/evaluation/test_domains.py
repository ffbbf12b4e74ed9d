"""What adapters cost on each source, whatever becomes of them, is what `tools.evaluate` finds of the models that are exported."""

import json

import numpy as np
import pytest
import torch

from engine.checkpoint.folder import find
from model.merge_ways import WAYS, Choice
from storage.shards import open_split
from tests.tools.called import call
from tools import evaluate
from tools.evaluation.domains import MEAN, Sample, bits_per_byte, open_adapted
from training.data import NO_TARGET, make_batch


@pytest.fixture(scope="module")
def run(trained):
    return trained.folder / "adapters"


@pytest.fixture(scope="module")
def adapted(run):
    return open_adapted(*find(run), torch.float32, "cpu")


def test_it_is_what_the_command_finds(adapted, run, trained, capsys, monkeypatch, tmp_path):
    models, dataset = adapted.unmerged(), open_split(trained.data, "validation")
    assert list(models) == ["base", "plays", "topics", "mixture g=0", "mixture g=1"]
    models["plays=0.5,topics=0.5"] = adapted.merged("cat", {"plays": 0.5, "topics": 0.5})
    models["mixture"] = models["mixture g=1"]
    for name in ("base", "topics", "mixture", "plays=0.5,topics=0.5"):
        flags = ["--data", trained.data, "--adapter", name, "--json", tmp_path / "scores"]
        done = call(evaluate.main, capsys, monkeypatch, run, *flags)
        assert done.code == 0, done.err
        expected = json.loads((tmp_path / "scores").read_text())["scores"]
        found = bits_per_byte(models[name], dataset)
        mean = found.pop(MEAN)
        assert found == pytest.approx({key: expected[key]["bits_per_byte"] for key in found}, rel=1e-5)
        assert mean == pytest.approx(np.mean(list(found.values())))


def test_models_share_the_base(adapted):
    weights = [model.layers[0].self_attn.q_proj.weight for model in adapted.unmerged().values()]
    weights += [
        adapted.merged(way, {"plays": 1.0, "topics": 1.0}, Choice()).layers[0].self_attn.q_proj.weight for way in WAYS
    ]
    assert len({weight.data_ptr() for weight in weights}) == 1


def test_halves_have_no_document_in_common_and_leave_out_none(trained):
    dataset = open_split(trained.data, "train")
    for number, source in enumerate(dataset.sources):
        rows = dataset.rows_per_source[source]
        whole = make_batch(dataset, np.full(rows, number), np.arange(rows))["targets"] != NO_TARGET
        counts, documents = [], []
        for half in (0, 1):
            batches = list(Sample(half=half).batches(dataset, source, 3))
            counts.append(sum(int((batch["targets"] != NO_TARGET).sum()) for batch in batches))
            seen = set()
            for batch in batches:
                starts = (batch["position_ids"] == 0).flatten().cumsum(0).view(batch["position_ids"].shape)
                for place in starts[batch["targets"] != NO_TARGET].unique():
                    seen.add(tuple(batch["input_ids"][starts == place].tolist()))
            documents.append(seen)
        assert sum(counts) == int(whole.sum())
        assert min(counts) > 0
        if source == "plays":  # some of the other texts are there twice
            assert not documents[0] & documents[1]


def test_one_document_has_no_halves(trained):
    dataset = open_split(trained.data, "validation")
    with pytest.raises(ValueError, match="has one document in the rows that are read"):
        list(Sample(1, 0).batches(dataset, "plays", 4))
