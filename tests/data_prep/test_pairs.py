"""Conversations become pairs of texts: apart in attention, and each side's tokens are those of its text."""

import json

import numpy as np
import pytest

from data_prep.tokenizer import open_tokenizer
from storage.shards import open_split
from tests.data_prep.builds import build_here
from tests.data_prep.texts import PROSE
from tests.processes import ROOT
from training.data import make_batch
from training.pairs import PairedTexts

RECORDS = [{"query": PROSE[i][:40].strip(), "document": PROSE[i][40 : 90 + 7 * i].strip()} for i in range(30)]


@pytest.fixture(scope="module")
def data(tokenizer_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    fields = {"prompt_field": "query", "response_field": "document", "validation_fraction": 0, "seq_length": 256}
    template = (ROOT / "recipes/pairs.jinja").read_text()
    build_here([folder / "pairs.jsonl"], tokenizer_folder, folder / "data", chat_template=template, **fields)
    return folder / "data"


def test_sides_are_the_texts(data, tokenizer_folder):
    dataset, tokenizer = open_split(data, "train"), open_tokenizer(tokenizer_folder)
    rows = np.arange(len(dataset))
    before = make_batch(dataset, np.zeros_like(rows), rows)
    batch = PairedTexts(dataset.manifest)(before, rows)
    found = []
    for ids, sides, positions in zip(
        *(batch[key].numpy() for key in ("input_ids", "targets", "position_ids")), strict=True
    ):
        for pair in range(sides.max() // 2 + 1):
            places = [np.flatnonzero(sides == 2 * pair + side) for side in (0, 1)]
            assert [positions[place[0]] for place in places] == [1, 1], "behind the token that begins a text"
            assert all((np.diff(place) == 1).all() for place in places)
            found.append(tuple(tokenizer.decode(ids[place]) for place in places))
    assert batch["num_targets"] == len(found)
    whole = {(record["query"], record["document"]) for record in RECORDS}
    assert len(whole & set(found)) >= 25, "the longest are cut"
    assert {query for query, _ in found} <= {record["query"] for record in RECORDS}


def test_only_one_side_is_no_pair(data):
    dataset = open_split(data, "train")
    batch = make_batch(dataset, np.array([0]), np.array([0]))
    for targets in (batch["targets"].clamp(max=-100), batch["input_ids"].roll(-1, 1)):
        assert PairedTexts(dataset.manifest)(batch | {"targets": targets}, np.array([0]))["num_targets"] == 0
