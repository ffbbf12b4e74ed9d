"""What a build makes of near-duplicates."""

import json
import multiprocessing
import shutil
import time
from collections import Counter

import numpy as np
import pytest

from data_prep import inspect
from data_prep.dropped import REASONS, ordered, read_dropped, write_dropped
from data_prep.duplicates.near import WORK_FOLDER
from data_prep.repack import repack
from data_prep.store import TokenStore
from data_prep.verify import problems
from storage.manifest import read_manifest
from storage.shards import open_split
from tests.data_prep.builds import build_here, contents
from tests.data_prep.chats import CHAT_OPTIONS
from tests.data_prep.texts import PROSE, write_lines

NEAR = {"near_duplicates": 0.7, "near_duplicate_sections": 0.7, "section_tokens": 40}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Topics; an edition of some of them with other words, anthologies of chapters of others, and a twin."""
    texts = {f"topic-{i}": text for i, text in enumerate(PROSE)}
    texts |= {f"edition-{i}": text.replace(" which ", " that ") + f" Edition {i}." for i, text in enumerate(PROSE[:12])}
    by_size = sorted(PROSE[12:], key=len)
    for i in range(6):
        chapters = by_size[20 + 3 * i : 23 + 3 * i]
        texts[f"anthology-{i}"] = "\n\n".join(
            [f"Preface number {i}: " + "all about it " * i, *chapters, f"End {i} " + "of it all " * 20]
        )
    texts["twin"] = PROSE[3]
    lines = [{"id": key, "text": text} for key, text in texts.items()]
    return write_lines(tmp_path_factory.mktemp("near") / "corpus.jsonl", lines)


@pytest.fixture(scope="module")
def near(corpus, tokenizer_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("near") / "data"
    build_here([corpus], tokenizer_folder, output, unit_bytes=60_000, id_field="id", deduplicate=True, **NEAR)
    return output


def test_a_build_leaves_out_what_repeats_and_says_so(near, tokenizer, capsys, monkeypatch):
    store, dropped, manifest = (
        TokenStore.open(near / "tokens"),
        ordered([*read_dropped(near / "tokens")]),
        read_manifest(near),
    )
    reasons = {}
    for doc, reason in zip(dropped.doc.tolist(), dropped.reason.tolist(), strict=True):
        reasons.setdefault(store.key(doc), set()).add(REASONS[reason])
    assert reasons["twin"] == {"exact duplicate"}
    editions = [reasons[f"edition-{i}"] for i in range(12)]
    assert sum(each == {"near-duplicate"} for each in editions) >= 10
    assert [reasons[f"anthology-{i}"] for i in range(6)] == [{"repeated section"}] * 6
    assert not any(key.startswith("topic") and "near-duplicate" in each for key, each in reasons.items())
    preface = tokenizer.decode(store.tokens(store.find("anthology-5")))
    assert preface.startswith("Preface number 5")
    assert preface.endswith("of it all of it all ")
    assert "End 5 of it all" in preface
    counts = manifest.statistics["dropped"]
    assert {reason: entry["count"] for reason, entry in counts.items()} == {
        REASONS[reason]: count for reason, count in Counter(dropped.reason.tolist()).items()
    }
    given, left = manifest.statistics["input"]["tokens"], sum(entry["tokens"] for entry in counts.values())
    assert manifest.statistics["tokens"] == given - left
    monkeypatch.setattr("sys.argv", ["inspect", str(near), "--dropped"])
    inspect.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(dropped.doc)
    assert any(
        "key 'twin', left out: exact duplicate (1.000, of document 3, key 'topic-3'): " in line for line in lines
    )


def test_a_list_that_is_not_that_of_the_index_is_a_problem(near, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(near, data)
    assert not [words for _, words in problems(data) if words]
    dropped = ordered([*read_dropped(data / "tokens")])
    cut, whole = np.flatnonzero(dropped.begin > 0)[0], np.flatnonzero(dropped.reason == 0)[0]
    for changed, words in (
        (dropped._replace(end=dropped.end - (np.arange(len(dropped.doc)) == cut)), "of which the index says"),
        (dropped.select(np.arange(len(dropped.doc)) != whole), "does not say why document"),
        (dropped.select(dropped.doc != dropped.doc[cut]), "leaves out 0 tokens of document"),
        (dropped._replace(doc=dropped.doc + 1000), "names documents that are not there"),
    ):
        write_dropped(data / "tokens", [changed])
        assert [words in problem for _, problem in problems(data) if problem] == [True]
    (data / "tokens" / "dropped.arrow").write_bytes(b"")
    assert ["cannot be read" in problem for _, problem in problems(data) if problem] == [True]


def test_rows_hold_just_what_is_left(near):
    store = TokenStore.open(near / "tokens")
    seen = Counter()
    for split in ("train", "validation"):
        dataset = open_split(near, split)
        for number in range(dataset.rows_per_source["documents"]):
            row, begin = dataset.row("documents", number), 0
            for length, context, doc, offset in zip(*(column.tolist() for column in row[1:]), strict=True):
                assert np.array_equal(row.ids[begin : begin + length], store.tokens(doc)[offset : offset + length])
                seen[doc] += length - context
                begin += length
    assert seen == {doc: len(store.tokens(doc)) for doc in range(len(store)) if store.split(doc)}
    kept = [store.documents(split) for split in ("train", "validation")]
    assert all(len(part.tokens(i)) == part.length[i] for part in kept for i in range(len(part)))


def test_kills_and_repacking_do_not_show(corpus, near, tokenizer_folder, tmp_path, monkeypatch):
    output, how = tmp_path / "data", {"unit_bytes": 60_000, "id_field": "id", "deduplicate": True} | NEAR
    process = multiprocessing.get_context("fork").Process(
        target=build_here, args=([corpus], tokenizer_folder, output), kwargs=how
    )
    process.start()
    while process.is_alive() and not (output / WORK_FOLDER / "unit-00001.documents.arrow").exists():
        time.sleep(0.001)
    process.kill()
    process.join()
    sketched = {path: path.stat().st_mtime_ns for path in (output / WORK_FOLDER).glob("unit-*.arrow")}
    assert sketched

    def killed(*_):
        assert all(path.stat().st_mtime_ns == time for path, time in sketched.items())
        raise KeyboardInterrupt

    for place in ("data_prep.duplicates.near.write_dropped", "data_prep.index.write_index"):
        with monkeypatch.context() as patch:
            patch.setattr(place, killed)
            with pytest.raises(KeyboardInterrupt):
                build_here([corpus], tokenizer_folder, output, **how)
    assert not (output / "manifest.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.duplicates.near.Deciding", killed)  # what was decided stays
        build_here([corpus], tokenizer_folder, output, **how)
    assert contents(output) == contents(near)
    repack(near, read_manifest(near).packing, tmp_path / "again", workers=1)
    assert contents(tmp_path / "again") == contents(near)


def test_a_build_without_them_has_the_plan_that_it_had(reference):
    plan = json.loads((reference / "plan.json").read_text())["plan"]
    assert not {"near_duplicates", "near_duplicate_sections", "ngram", "section_tokens"} & plan.keys()
    assert "dropped" not in read_manifest(reference).statistics
    assert not (reference / "tokens" / "dropped.arrow").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"near_duplicates": 0.8, "ngram": 1000}, "--ngram 1000: no document has so many tokens"),
        ({"ngram": 5}, "--ngram has no effect without --near-duplicates"),
        ({"near_duplicates": 0.8, "section_tokens": 99}, "--section-tokens has no effect without"),
        ({"near_duplicates": 0.1}, "greater than or equal to 0.3"),
        ({"near_duplicate_sections": 0.8, **CHAT_OPTIONS}, "nothing can be cut out of a conversation"),
    ],
)
def test_refusals(tokenizer_folder, tmp_path, options, words):
    path = write_lines(tmp_path / "short.jsonl", [{"text": "so short a text"}, {"text": "another one"}])
    with pytest.raises(ValueError, match=words):
        build_here([path], tokenizer_folder, tmp_path / "data", **options)
    assert not (tmp_path / "data" / "manifest.json").exists()
