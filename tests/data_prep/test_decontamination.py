"""No n-gram of validation or evaluation texts is left in training."""

import re

import numpy as np
import pytest

from data_prep.dropped import REASONS, ordered, read_dropped
from data_prep.duplicates import candidates
from data_prep.duplicates.contamination import write_reference
from data_prep.duplicates.ngrams import hashes
from data_prep.leave_out import evaluation_files
from data_prep.repack import repack
from data_prep.store import TokenStore
from data_prep.verify import problems
from storage.manifest import read_manifest
from tests.data_prep.builds import build_here, contents, failure, run
from tests.data_prep.chats import CHAT_OPTIONS
from tests.data_prep.texts import PROSE, write_lines

NGRAM = 20


def grams(ids: np.ndarray) -> set[bytes]:
    ids = ids.astype(np.uint32)
    return {ids[i : i + NGRAM].tobytes() for i in range(len(ids) - NGRAM + 1)}


def shared(data, evaluation) -> int:
    """By brute force: n-grams that training has in common with validation or with texts."""
    store = TokenStore.open(data / "tokens")
    sides = {
        split: [store.tokens(int(doc))[1:-1] for doc in store.documents(split).doc] for split in ("train", "validation")
    }
    sides["validation"] += evaluation
    train, others = (set().union(*map(grams, sides[split])) for split in ("train", "validation"))
    return len(train & others)


def test_the_reference_is_sorted_in_pieces(tmp_path, monkeypatch):
    texts = [np.random.default_rng(n).integers(0, 5, 3 * n, np.uint16) for n in range(40)]
    monkeypatch.setattr(candidates, "PAIRS_AT_ONCE", 50)
    assert write_reference(tmp_path / "reference", texts, 4) == (38, 2)
    expected = np.unique(np.concatenate([hashes(ids, 4) for ids in texts]))
    assert np.fromfile(tmp_path / "reference", np.uint64).tolist() == expected.tolist()
    assert len(list(tmp_path.glob("run-*"))) > 1


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Topics, and collections that quote paragraphs of others; what stands around a quotation is itself a quotation."""
    generator = np.random.default_rng(0)
    texts = [*PROSE[:40]]
    for number in range(25):
        quotations = [PROSE[i].split("\n\n")[k % 3] for k, i in enumerate(generator.integers(0, 40, 6))]
        texts.append(
            f"Collection {number}. " + f"\n\nNote {number}: so it was said. {'And on. ' * 50}\n\n".join(quotations)
        )
    lines = [{"id": str(i), "text": text} for i, text in enumerate(texts)]
    return write_lines(tmp_path_factory.mktemp("contaminated") / "corpus.jsonl", lines)


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    texts = [{"text": PROSE[5][200:1500]}, {"text": PROSE[9]}, {"text": "too short"}]
    return write_lines(tmp_path_factory.mktemp("evaluation") / "tasks.jsonl", texts)


@pytest.mark.parametrize("near", [{}, {"near_duplicate_sections": 0.8, "section_tokens": 40}])
def test_nothing_is_shared_afterwards(corpus, evaluation, tokenizer_folder, tokenizer, tmp_path, capsys, near):
    how = {"validation_fraction": 0.2, "unit_bytes": 60_000, "id_field": "id"} | near
    texts = [np.array(tokenizer.encode_batch([text])[0]) for text in (PROSE[5][200:1500], PROSE[9])]
    before = build_here([corpus], tokenizer_folder, tmp_path / "before", **how)
    assert shared(tmp_path / "before", texts) > 0
    how |= {"decontaminate": NGRAM, "evaluation": evaluation_files([str(evaluation)])}
    after = build_here([corpus], tokenizer_folder, tmp_path / "after", workers=1 + bool(near), **how)
    assert shared(tmp_path / "after", texts) == 0
    assert "have fewer than 20 tokens" in capsys.readouterr().err
    dropped = ordered([*read_dropped(tmp_path / "after" / "tokens")])
    mine = dropped.select(dropped.reason == REASONS.index("contaminated"))
    counts = after.statistics["dropped"]["contaminated"]
    assert (counts["count"], counts["tokens"]) == (len(mine.doc), int((mine.end - mine.begin).sum()))
    assert before.splits["validation"]["documents"].tokens == after.splits["validation"]["documents"].tokens
    assert 0.2 < after.splits["train"]["documents"].tokens / before.splits["train"]["documents"].tokens < 1
    assert not [words for _, words in problems(tmp_path / "after") if words]
    repack(tmp_path / "after", read_manifest(tmp_path / "after").packing, tmp_path / "again", workers=1)
    assert contents(tmp_path / "again") == contents(tmp_path / "after")


def test_a_contaminated_conversation_is_left_out_as_a_whole(chat_folder, tmp_path):
    words = "a long answer that stands in both of them, word for word, and is long enough to be found again"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": words}]
    others = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"so {i}"}] for i in range(12)]
    path = write_lines(
        tmp_path / "chats.jsonl", [{"id": str(i), "messages": each} for i, each in enumerate([turns] * 12 + others)]
    )
    build_here(
        [path], chat_folder, tmp_path / "data", **CHAT_OPTIONS | {"validation_fraction": 0.4, "decontaminate": 30}
    )
    store = TokenStore.open(tmp_path / "data" / "tokens")
    assert {store.split(doc) for doc in range(12)} == {"validation", None}
    assert "train" in {store.split(doc) for doc in range(12, 24)}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"decontaminate": 1000},
            "--decontaminate 1000: no text of the validation split or of --evaluation has so many",
        ),
        ({"evaluation": {}}, "--evaluation has no effect without --decontaminate"),
        (
            {"decontaminate": 5, "evaluation": {"/nowhere.txt": "0" * 64}},
            "/nowhere.txt of --evaluation is gone or has changed",
        ),
        ({"decontaminate": 2, "validation_fraction": 0.5}, "--decontaminate 2 leaves no document for training"),
    ],
)
def test_refusals(tokenizer_folder, tmp_path, options, words):
    path = write_lines(tmp_path / "short.jsonl", [{"text": "so short a text"}] * 4)
    with pytest.raises(ValueError, match=re.escape(words)):
        build_here([path], tokenizer_folder, tmp_path / "data", **options)
    assert not (tmp_path / "data" / "manifest.json").exists()


def test_the_command_names_a_missing_evaluation_file(corpus, tokenizer_folder, tmp_path):
    words = ["--input", corpus, "--tokenizer", tokenizer_folder, "--output", tmp_path / "data", "--seq-length", 64]
    done = run("build", *words, "--decontaminate", 50, "--evaluation", tmp_path / "no.jsonl")
    assert "no.jsonl" in failure(done)
