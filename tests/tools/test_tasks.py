"""The tasks on a tiny setting, from texts of this machine to the tables, and what they are measured by."""

import json
import subprocess
from math import log
from pathlib import Path
from pydoc_data import topics
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from model import merge_ways
from storage.shards import open_split
from tests.forks import run_python
from tests.tools.called import call
from tools import tasks
from tools.specialists import domains, packages, search, trainings
from tools.specialists.answers import overlap, right_words, shared_words
from tools.specialists.domains import judged
from tools.specialists.everything import run_tasks
from tools.specialists.likelihoods import Likelihoods
from tools.specialists.metrics import exact_match, normalised_mutual_information, word_f1
from tools.specialists.questions import Question, of_page, sections, split, write_questions
from tools.specialists.results import Figure, Results
from tools.specialists.seeding import LEAST_TOKENS, frequencies, groups_of
from tools.specialists.texts import DOMAINS, is_held_out, passages, write_domain
from tools.specialists.trainings import Settings, Workshop

TINY = Settings(
    texts_bytes=20_000,
    vocab_size=400,
    seq_length=128,
    base_steps=2,
    adapter_steps=2,
    grouped_rows=48,
    grouped_steps=2,
    mixture_steps=2,
    seeds=1,
    answer_steps=2,
    search_steps=2,
    questions=9,
)
PROSE = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
LETTERS = dict(zip(DOMAINS, ("etaoinsh", "αβγδεζηθ", "абвгдежз", "קראטוןםפ"), strict=True))
"""Texts in letters of their own: nobody could mistake one source for another."""
BEGINS = "Here begins part {} of page {}."
PAGES = [
    (name, "".join(f"Title\n=====\n\n{BEGINS.format(part, name)} {'word ' * 16}\n\n" for part in range(5)))
    for held_out in (True, False)
    for name in [name for name in map(str, range(2000)) if is_held_out(name) is held_out][:6]
]
"""Six that are held out, and six to learn from, of five sections."""


def forked(command, stdout, stderr):
    done = run_python(command[1:], timeout=120)
    stdout.write((done.stdout + done.stderr).encode())
    return done


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The work folder of all tasks, and their tables."""
    work = tmp_path_factory.mktemp("tasks") / "work"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainings, "subprocess", SimpleNamespace(run=forked, STDOUT=subprocess.STDOUT))
        workshop = Workshop(work, TINY)
        (work / "texts").mkdir()
        (work / "questions").mkdir()
        for number, (name, letters) in enumerate(LETTERS.items()):
            text = PROSE[number * 60_000 : (number + 1) * 60_000].translate(str.maketrans("etaoinsh", letters))
            pages = [(f"page-{i}", text[i : i + 2000]) for i in range(0, len(text), 2000)]
            write_domain(pages, work / f"texts/{name}.jsonl", TINY.texts_bytes)
        questions = [
            Question(f"page {i}", f"What is {i} and {i}?", f"It is {2 * i}", f"{i} and {i}") for i in range(60)
        ]
        for name in ("translation", "answering"):
            write_questions(questions[3:], work / f"questions/{name}.jsonl")
            write_questions(questions[:3], work / f"questions/{name}.held_out.jsonl")
        patch.setattr(search, "python", lambda _: PAGES)
        yield work, run_tasks(["domains", "translation", "answering", "search"], workshop)


def test_every_way_is_measured_on_every_source(whole):
    work, found = whole
    table = found["domains"].rows
    assert set(DOMAINS) == set(open_split(work / "data/domains", "validation").sources)
    assert {way for way in table if way.startswith("merged: ")} == {f"merged: {way}" for way in MERGED}
    assert len(table) == 8 + len(MERGED)
    for figures in table.values():
        assert figures.keys() == set(DOMAINS)
        assert all(0 < figure.mean < 20 for figure in figures.values())
    for source in DOMAINS:
        assert table["best single adapter"][source].mean <= table["routed to its own"][source].mean
        assert table["mixture, g = 1"][source].mean <= table["base"][source].mean + 0.1
    kept = json.loads((work / "results/domains.json").read_text())
    assert kept["rows"]["base"]["python"]["mean"] == table["base"]["python"].mean
    assert "| base |" in (work / "results/domains.md").read_text()


def test_answers_are_compared_with_the_base_and_a_copy(whole):
    _, found = whole
    assert found["translation"].rows.keys() == {"copy", "base", "adapter"}
    assert found["answering"].rows["copy"]["exact match"].mean == 0
    # page 0: "0 and 0" of "It is 0": one word of three and one of the three of the reference
    assert found["answering"].rows["copy"]["F1"].mean == pytest.approx(100 * (2 / 6) / 3)


def test_only_answers_carry_loss(whole):
    work, _ = whole
    data = work / "data/translation-answering"
    for entry in json.loads((data / "manifest.json").read_text())["splits"]["train"].values():
        assert 0 < entry["targets"] < entry["tokens"] / 2


def test_nothing_is_made_twice_and_other_settings_are_refused(whole, monkeypatch):
    work, found = whole
    monkeypatch.setattr(trainings, "subprocess", None)  # no command is run
    monkeypatch.setattr(domains, "merges", lambda *_: ())  # seconds
    again = run_tasks(["domains", "search"], Workshop(work, TINY))
    assert again["search"].rows == found["search"].rows
    kept = {way: row for way, row in found["domains"].rows.items() if not way.startswith("merged: ")}
    assert again["domains"].rows == kept
    with pytest.raises(ValueError, match="was made with other settings"):
        Workshop(work, TINY._replace(seeds=2))
    with pytest.raises(ValueError, match="holds something else"):
        Workshop(work / "texts", TINY)


def test_documents_go_to_their_likeliest_member():
    rng = np.random.default_rng(0)
    values = torch.from_numpy(-rng.random((2, 3, 8)))
    begins = torch.zeros(3, 8, dtype=torch.bool)
    begins[:, 0] = begins[1, 5] = True
    values[:, 2] = 0  # padding
    numbers = torch.tensor([[4] * 8, [7] * 5 + [9] * 3, [-1] * 8])
    found = Likelihoods(values, begins, numbers, 16)
    pieces = [values[:, 0].sum(1), values[:, 1, :5].sum(1), values[:, 1, 5:].sum(1)]
    assert found.likeliest() == [int(piece.argmax()) for piece in pieces]
    together = found._replace(documents=torch.where(numbers == 9, 4, numbers))
    assert together.likeliest() == [int((pieces[0] + pieces[2]).argmax()), int(pieces[1].argmax())]
    assert found.of_members() == pytest.approx([-float(values[0].sum()), -float(values[1].sum())])
    expected = -sum(float(torch.logsumexp(piece, 0)) - log(2) for piece in pieces)
    assert found.mixed(1.0) == pytest.approx(expected)
    tokens = torch.logsumexp(values[:, :2], 0) - log(2)
    assert found.mixed(0.0) == pytest.approx(-float(tokens.sum()))


def test_mutual_information_by_hand():
    assert normalised_mutual_information("aabb", [1, 1, 0, 0]) == pytest.approx(1)
    assert normalised_mutual_information("aabb", [1, 0, 1, 0]) == pytest.approx(0)
    assert normalised_mutual_information("aaaa", [1, 1, 1, 1]) == 1
    # three of four alike: H(a) = log 2, H(b) = log 4 - 3/4 log 3, H(a, b) = log 4 - 1/2 log 2
    both, one = 1.5 * log(2), log(4) - 0.75 * log(3)
    assert normalised_mutual_information("aabb", "cccd") == pytest.approx(2 * (log(2) + one - both) / (log(2) + one))
    with pytest.raises(ValueError, match="the same things"):
        normalised_mutual_information("ab", "a")


def test_measures_of_answers_by_hand():
    assert exact_match("The  Cat.", "a cat") == 1
    assert exact_match("cat", "cats") == 0
    assert word_f1("open the file now", "open file") == pytest.approx(2 * 2 / (3 + 2))
    assert word_f1("", "file") == 0
    assert right_words(["x", "y"], ["x", "z"]) == {"exact match": 50, "F1": 50}
    assert overlap(["ein Haus"], ["ein Haus"])["chrF"] == pytest.approx(100)
    assert overlap(["abc"], ["xyz"])["chrF"] == 0
    assert shared_words(["a b c d"], ["a b x"]) == pytest.approx({"ROUGE-1": 100 * 4 / 7, "ROUGE-L": 100 * 4 / 7})


def test_groups_are_those_of_the_points():
    rng = np.random.default_rng(1)
    truth = rng.integers(3, size=90)
    points = torch.from_numpy(np.eye(8)[truth] * 5 + rng.normal(size=(90, 8)) * 0.3)
    assert normalised_mutual_information(truth.tolist(), groups_of(points, 3, rng).tolist()) == pytest.approx(1)


def test_documents_are_grouped_by_their_tokens(whole):
    """Sources that have letters of their own are told apart without fault, whatever the base has learned in two steps."""
    work, _ = whole
    true, grouped = [], []
    for file in sorted((work / "groups/1").glob("*.jsonl")):
        for line in file.read_text().splitlines():
            text = json.loads(line)["text"]
            true.append(max(LETTERS, key=lambda source: sum(map(text.count, LETTERS[source]))))
            grouped.append(file.stem)
    assert set(true) == set(LETTERS)
    assert normalised_mutual_information(true, grouped) == 1


def test_distances_of_documents_are_those_of_hellinger(whole):
    work, _ = whole
    dataset = open_split(work / "data/domains", "train")
    points, pieces = frequencies(dataset, np.arange(0, sum(dataset.rows_per_source.values()), 5))
    assert len(points) == len(pieces) > 8
    assert min(map(len, pieces)) >= LEAST_TOKENS
    for one in (0, len(pieces) - 1):
        shares = [np.bincount(pieces[place], minlength=TINY.vocab_size) / len(pieces[place]) for place in (one, 3)]
        overlap = np.sqrt(shares[0] * shares[1]).sum()
        assert float((points[one] - points[3]).square().sum()) == pytest.approx(2 - 2 * overlap, abs=1e-5)


def test_a_statement_that_fails_is_said():
    better, worse = ({way: {"x": value} for way in WAYS} for value in (1.0, 2.0))
    held = judged([better | {"base": {"x": 1.5}}], [0.95], ["x"])
    assert [statement.rpartition(" ")[2] for statement in held.statements] == ["yes", "yes", "yes"]
    failed = judged([worse | {"base": {"x": 1.5}, "best single adapter": {"x": 1.0}}], [0.5], ["x"])
    assert [statement.rpartition(" ")[2] for statement in failed.statements] == ["NO", "NO", "NO"]


MERGED = ["sum", "mean", *(way for way in merge_ways.WAYS if way != "cat")]
MERGED += [f"a weight for each {what}, learned" for what in ("adapter", "layer")]
WAYS = ("base", "routed to its own", "best single adapter", "mixture, g = 1")


def test_a_table_has_the_mean_and_the_spread():
    table = Results("t", ["x"], {"way": {"x": Figure([1.0, 2.0])}}, 2, ["said: yes"])
    assert "| way | 1.50 ±0.50 |" in table.markdown()
    assert table.markdown().endswith("- said: yes\n")


def test_passages_lose_nothing_and_held_out_pages_are_in_none(tmp_path):
    text = PROSE[:30_000]
    found = list(passages(text))
    assert text.startswith("".join(found))
    assert len(text) - len("".join(found)) < 200
    pages = [(f"page-{i}", f"words of page-{i}.\n" * 60) for i in range(50)]
    write_domain(pages, tmp_path / "d.jsonl", 10**6)
    written = {line.split('"')[3].split("/")[1] for line in (tmp_path / "d.jsonl").read_text().splitlines()}
    assert written == {name for name, _ in pages if not is_held_out(name)}
    assert 0 < len(pages) - len(written) < 20


def test_questions_of_a_page_stay_together():
    questions = [Question(f"page {i // 2}", str(i), "", "") for i in range(200)]
    learned, held_out = split(questions)
    assert {q.page for q in learned}.isdisjoint(q.page for q in held_out)
    assert len(learned) + len(held_out) == 200
    assert 0 < len(held_out) < 60


def test_sections_and_manual_pages_are_read():
    text = ":mod:`json` --- JSON\n====================\n\n.. module:: json\n\n" + "Use :func:`dumps` well. " * 9
    ((title, body),) = sections(text)
    assert title == "json --- JSON"
    assert body.startswith("Use dumps well.")
    page = ".SH NAME\nfopen, fdopen \\- stream open functions\n.SH SYNOPSIS\n.nf\n.B #include <stdio.h>\n.PP\n"
    page += '.BI "FILE *fopen();"\n.fi\n.SH DESCRIPTION\n'
    assert of_page(page) == ("fopen", "stream open functions", "stdio.h", "#include <stdio.h>\nFILE *fopen();")
    assert of_page(".SH NAME\nx\n") is None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["dreams"], "there is no task 'dreams': domains, translation, summarisation, answering"),
        ([], "say which tasks, or --all"),
        (["domains", "--base", "nowhere"], "--base nowhere is no Hugging Face folder"),
        (["domains", "--seeds", "0"], "--seeds 0: at least 1"),
    ],
)
def test_bad_input_is_said(capsys, monkeypatch, words, sentence):
    done = call(tasks.main, capsys, monkeypatch, *words)
    assert done.code == 2
    assert sentence in done.err


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="pip install no_such_texts"):
        packages.of_pip("no_such_texts")
    monkeypatch.setenv("PATH", str(tmp_path))
    for fetch, name in ((packages.of_debian, ["some-texts"]), (packages.of_npm, "some-texts")):
        with pytest.raises(ValueError, match=r"some-texts are needed in .* is not installed"):
            fetch(name, tmp_path)


def test_a_catalogue_is_read(tmp_path):
    """Of one message and one of two forms, as msgfmt would write it."""
    import struct

    texts = [
        (b"", b"Content-Type: text/plain; charset=UTF-8\n"),
        (b"file", "Dateï".encode()),
        (b"one\0two", b"eins\0zwei"),
    ]
    at, table, body = 28 + 16 * len(texts), [], b""
    for column in (0, 1):
        for pair in texts:
            table.append((len(pair[column]), at + len(body)))
            body += pair[column] + b"\0"
    header = struct.pack("<7I", 0x950412DE, 0, len(texts), 28, 28 + 8 * len(texts), 0, 0)
    path = Path(tmp_path / "x.mo")
    path.write_bytes(header + b"".join(struct.pack("<2I", *entry) for entry in table) + body)
    assert packages.catalogue(path) == {"file": "Dateï"}


def test_sections_look_for_the_page_without_them(whole):
    work, found = whole
    pairs = search.pairs_of([*PAGES, ("empty", "no sections")], 9)
    assert len(pairs.queries) == 9
    for query, place in zip(pairs.queries, pairs.right, strict=True):
        _, _, _, part, _, _, name, *_ = query.replace(".", " ").split()
        assert part in "13"
        assert is_held_out(name)
        assert [BEGINS.format(part, name) in pairs.documents[place] for part in range(5)] == [True, False] * 2 + [True]
    table = found["search"].rows
    assert table.keys() == {
        "BM25",
        "base, mean",
        "base, last",
        "adapter that predicts, mean",
        "adapter that predicts, last",
        "adapter that searches, mean",
    }
    for figures in table.values():
        assert 0 <= figures["recall@1"].mean <= figures["recall@5"].mean <= figures["recall@10"].mean <= 1
    assert (work / "results/search.md").exists()
    with pytest.raises(ValueError, match="no page is held out"):
        search.pairs_of(PAGES[6:], 5)


def test_sections_that_follow_one_another_are_learned_as_pairs(whole):
    work, _ = whole
    learned = list(search.pairs_to_learn(PAGES))
    assert len(learned) == 2 * 6
    for number, question in enumerate(learned):
        assert not is_held_out(question.page)
        part = number % 2 * 2
        assert question.response.startswith(BEGINS.format(part, question.page))
        assert question.prompt.startswith(BEGINS.format(part + 1, question.page))
    manifest = json.loads((work / "data/pairs/manifest.json").read_text())
    assert manifest["splits"]["train"]["python"]["documents"] == len(learned)
