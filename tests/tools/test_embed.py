"""Vectors of documents are those of transformers' hidden states, however they are batched; and what they find."""

import json
import sys
from itertools import pairwise

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from transformers import AutoModelForCausalLM

from data_prep.records import Document
from storage import atomic
from tests.data_prep.texts import PROSE
from tests.tools.called import call
from tests.tools.trained import export_to, write_documents
from tools import embed
from tools.embedding import Embedder
from tools.evaluation.retrieval import Found, Pairs, by_words, ranks_of
from tools.trained import open_trained

CHUNK = 40
TEXTS = ["Hamlet.", *(text[: 80 * (1 + number % 7)] for number, text in enumerate(PROSE[:20]))]


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    return export_to(trained.folder / "zero3", tmp_path_factory.mktemp("embed") / "hf", "float32")


@pytest.fixture(scope="module")
def opened(exported):
    return open_trained(str(exported), None, "cpu", "float32")


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    return write_documents(tmp_path_factory.mktemp("texts") / "texts.jsonl", TEXTS)


@pytest.fixture
def command(capsys, monkeypatch):
    return lambda *words: call(embed.main, capsys, monkeypatch, *words)


def numbered(texts):
    return [Document(str(number), text) for number, text in enumerate(texts)]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_are_pooled_hidden_states_of_transformers(exported, opened, pooling):
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    found = Embedder(opened, pooling, CHUNK, 300)(numbered(TEXTS))
    expected = []
    for text in TEXTS:
        ids = opened.tokenizer.encode_batch([text])[0].tolist()
        for at in range(0, len(ids), CHUNK - 1):
            window = torch.tensor([[opened.tokenizer.bos_id, *ids[at : at + CHUNK - 1]]])
            with torch.no_grad():
                hidden = theirs(window, output_hidden_states=True).hidden_states[-1][0, 1:]
            vector = hidden.mean(0) if pooling == "mean" else hidden[-1]
            expected.append((vector / vector.norm()).numpy())
    assert len(expected) > len(TEXTS) + 5
    np.testing.assert_allclose(found.vectors, expected, atol=1e-5)


@settings(max_examples=20)
@given(order=st.permutations(range(6)), batch_tokens=st.integers(1, 600))
def test_a_vector_does_not_depend_on_what_is_read_beside_it(opened, order, batch_tokens):
    texts = TEXTS[:6]
    alone = [Embedder(opened, "mean", CHUNK, 1)(numbered([text])).vectors for text in texts]
    together = Embedder(opened, "mean", CHUNK, batch_tokens)(numbered(texts[place] for place in order))
    np.testing.assert_allclose(together.vectors, np.concatenate([alone[place] for place in order]), atol=2e-6)


@given(text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=200), tokens=st.integers(2, 20))
def test_windows_are_the_text_and_its_tokens(opened, text, tokens):
    windows = list(Embedder(opened, "mean", tokens, 100).windows(Document("x", text)))
    if windows:
        assert [windows[0].start, windows[-1].end] == [0, len(text)]
        assert all(one.end == two.start for one, two in pairwise(windows))
        ids = np.concatenate([window.ids for window in windows])
        np.testing.assert_array_equal(ids, opened.tokenizer.encode_batch([text])[0])
        assert all(len(window.ids) < tokens for window in windows)


def test_the_folder_holds_what_a_search_needs(command, exported, documents, tmp_path):
    words = ["--input", documents, "--output", tmp_path / "out", "--chunk-tokens", CHUNK]
    done = command(exported, *words)
    assert done.code == 0, done.err
    vectors, chunks = np.load(tmp_path / "out/vectors.npy"), parquet.read_table(tmp_path / "out/chunks.parquet")
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    texts, keys = {}, list(dict.fromkeys(chunks["key"].to_pylist()))
    for key, start, end in zip(*(chunks[name].to_pylist() for name in ("key", "start", "end")), strict=True):
        texts[key] = texts.get(key, "") + TEXTS[keys.index(key)][start:end]
    assert list(texts.values()) == TEXTS

    index = faiss.read_index(str(tmp_path / "out/index.faiss"))
    scores, places = index.search(vectors[:9], 5)
    cosines = vectors[:9] @ vectors.T
    np.testing.assert_allclose(scores, -np.sort(-cosines, axis=1)[:, :5], atol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(cosines, places, 1), scores, atol=1e-5)
    facts = json.loads((tmp_path / "out/about.json").read_text())
    assert (facts["pooling"], facts["chunk_tokens"]) == ("mean", CHUNK)

    again = command(exported, *words)
    assert again.code == 2
    assert "exists already" in again.err


def test_adapters_of_a_run_and_bfloat16(command, trained, documents, tmp_path):
    run, found = trained.folder / "adapters", {}
    for adapter, dtype in (("plays", "float32"), ("base", "float32"), ("plays", "bfloat16")):
        words = ["--adapter", adapter, "--dtype", dtype, "--input", documents, "--output"]
        done = command(run, *words, tmp_path / f"{adapter}-{dtype}")
        assert done.code == 0, done.err
        found[adapter, dtype] = np.load(tmp_path / f"{adapter}-{dtype}/vectors.npy")
    assert np.abs(found["plays", "float32"] - found["base", "float32"]).max() > 1e-3
    np.testing.assert_allclose(found["plays", "bfloat16"], found["plays", "float32"], atol=0.05)
    assert json.loads((tmp_path / "base-float32/about.json").read_text())["chunk_tokens"] == 96  # of its rows


def test_interrupted_writing_leaves_nothing(command, exported, documents, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(faiss, "serialize_index", full)
    done = command(exported, "--input", documents, "--output", tmp_path / "sub/out")
    assert done.code == 2
    assert "no space is left" in done.err
    monkeypatch.undo()
    monkeypatch.setattr(atomic, "publish", full)
    assert command(exported, "--input", documents, "--output", tmp_path / "sub/out").code == 2
    assert list((tmp_path / "sub").iterdir()) == []


def test_bad_input(command, exported, trained, documents, tmp_path, monkeypatch):
    empty = write_documents(tmp_path / "empty.jsonl", ["words", ""])
    out = ["--output", tmp_path / "out"]
    for words, sentence in (
        ([exported], "give --input and --output"),
        ([exported, "--input", documents], "give --input and --output"),
        ([exported, "--input", documents, *out, "--evaluate", documents], "give --input and --output"),
        ([exported, "--input", documents, *out, "--text-field", "body"], "no field 'body'"),
        ([exported, "--input", empty, *out], "document empty.jsonl#18 has no text"),
        ([exported, "--input", documents, *out, "--chunk-tokens", "1"], "--chunk-tokens 1: at least 2"),
        ([exported, "--input", tmp_path / "nowhere", *out], "there is no file or folder"),
        ([exported, "--input", documents, *out, "--adapter", "plays"], "has no meaning for the exported model"),
        ([trained.folder / "adapters", "--input", documents, *out], "choose with --adapter"),
        ([trained.folder / "adapters", "--input", documents, *out, "--adapter", "mixture"], "mixes adapters"),
        ([exported, "--evaluate", documents, "--query-field", "text"], "no field 'document'"),
        ([exported, "--evaluate", documents, "--document-field", "query"], "name two fields"),
    ):
        done = command(*words)
        assert (done.code, done.err.count("\n"), sentence in done.err) == (2, 1, True), done.err
        assert not (tmp_path / "out").exists()
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(embed, "find_spec", lambda name: None)
    assert "tools.embed needs faiss-cpu here" in command(exported, "--input", documents, *out).err


def test_ranks_and_their_figures():
    scores = np.array([[0.1, 0.9, 0.5], [0.3, 0.2, 0.1], [0.5, 0.5, 0.5], [0.2, 0.1, 0.0]])
    ranks = ranks_of(scores, np.array([0, 0, 1, 1]))
    assert ranks.tolist() == [3, 1, 3, 2]
    found = Found.at(np.array([1, 2, 4, 11]))
    assert found.recall == {1: 0.25, 5: 0.75, 10: 0.75}
    assert found.mrr == pytest.approx((1 + 1 / 2 + 1 / 4 + 1 / 11) / 4)


def test_equal_documents_are_one_and_words_find_what_has_them():
    texts = ["the cat sat on a mat", "dogs bark at night", "the cat sat on a mat", "ships sail the sea"]
    pairs = Pairs.of(["cat mat", "bark", "sat", "unheard"], texts)
    assert (pairs.documents, pairs.right.tolist()) == ([texts[0], texts[1], texts[3]], [0, 1, 0, 2])
    assert by_words(pairs).recall[1] == 0.75  # the last query tells no document from another
    assert by_words(pairs).mrr == pytest.approx((3 + 1 / 3) / 4)


def test_a_document_is_found_by_a_part_of_itself(command, trained, tmp_path):
    """A model finds a document by its own beginning, which is one of its chunks."""
    file = tmp_path / "pairs.jsonl"
    long = [text[:600] for text in PROSE[:12]]
    file.write_text("".join(json.dumps({"query": text, "document": text}) + "\n" for text in long))
    flags = ["--adapter", "topics", "--chunk-tokens", CHUNK, "--json", tmp_path / "found.json"]
    done = command(trained.folder / "adapters", "--evaluate", file, *flags)
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "found.json").read_text())["found"]
    model, base, words = found
    assert ("topics" in model, "base" in base, words) == (True, True, "BM25")
    assert all(figures == {"recall@1": 1, "recall@5": 1, "recall@10": 1, "MRR": 1} for figures in found.values())
    assert "BM25" in done.out
