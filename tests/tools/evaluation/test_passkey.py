"""Retrieval of pass keys: found by a model that copies, at the depths that it remembers; chance without a memory."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep.tokenizer import open_tokenizer
from model.llama import Llama
from storage.shards import open_split
from tests.data_prep.texts import DEEPSEEK, PROSE
from tests.model.tiny import tiny
from tests.tools.trained import build_data, write_documents
from tools.evaluation.passkey import PHRASES, Filler, Passkeys, default_lengths, language_of, passkey

CHINESE = "长文本语言模型需要记住很久以前读过的内容，才能回答最后提出的问题。我们把文档切分成若干块，再逐块阅读。" * 6


class Copier:
    """Predicts what followed the longest earlier occurrence of the latest tokens, in the last `memory` of them."""

    def __init__(self, vocab_size: int, memory: int = 10**6):
        self.config, self.memory = tiny(vocab_size=vocab_size, max_position_embeddings=4096), memory
        self.layers, self.embed_tokens = [self.read], SimpleNamespace(weight=torch.zeros(()))
        self.history = []

    def embed(self, input_ids, documents):
        return input_ids.double().unsqueeze(-1)

    def read(self, x, documents, cache):
        ids, _ = cache.append(x.unsqueeze(-1), x.unsqueeze(-1))
        self.history = ids.flatten().long().tolist()[-self.memory :]
        return x

    def norm(self, x):
        return x

    def lm_head(self, x):
        ids, best, following = self.history, 0, 0
        for end in range(len(ids) - 1, 0, -1):
            same = 0
            while same < end and ids[end - 1 - same] == ids[-1 - same]:
                same += 1
            if same > best:
                best, following = same, ids[end]
        logits = torch.zeros(1, 1, self.config.vocab_size)
        logits[..., following] = 12.0 if best else 0.0
        return logits


@pytest.fixture(scope="module")
def english(tokenizer, tmp_path_factory):
    return built(tmp_path_factory.mktemp("english"), tokenizer, [text[:600] for text in PROSE[:6]])


@pytest.fixture(scope="module")
def chinese(tmp_path_factory):
    return built(tmp_path_factory.mktemp("chinese"), DEEPSEEK, [CHINESE] * 4)


def built(folder, tokenizer, texts):
    documents = write_documents(folder / "documents.jsonl", texts)
    build_data([f"texts={documents}"], tokenizer, folder / "data", seq_length=64, validation_fraction=0)
    return open_tokenizer(tokenizer), open_split(folder / "data", "train")


@pytest.fixture(params=["english", "chinese"])
def opened(request):
    return request.getfixturevalue(request.param)


def figures(found, name):
    return {(cell["length"], cell["depth"]): cell[name] for cell in found["cells"]}


def test_a_model_that_copies_finds_every_key(opened):
    tokenizer, dataset = opened
    passkeys = Passkeys(tokenizer, dataset)
    lengths = [passkeys.shortest, passkeys.shortest + 90]
    found = passkey(Copier(tokenizer.vocab_size), passkeys, lengths, depths=3, trials=3)
    assert set(figures(found, "exact_match")) == {(length, depth) for length in lengths for depth in (0, 0.5, 1)}
    assert set(figures(found, "exact_match").values()) == {1.0}
    assert set(figures(found, "forced_choice").values()) == {1.0}
    assert min(figures(found, "nll_drop").values()) > 10
    assert json.loads(json.dumps(found)) == found


def test_a_key_beyond_the_memory_is_not_found(opened):
    tokenizer, dataset = opened
    passkeys = Passkeys(tokenizer, dataset)
    length = passkeys.shortest + 200
    found = passkey(Copier(tokenizer.vocab_size, passkeys.shortest), passkeys, [length], depths=2, trials=4)
    for name in ("exact_match", "forced_choice"):
        assert figures(found, name)[length, 1] == 1
    assert figures(found, "exact_match")[length, 0] == 0
    assert figures(found, "forced_choice")[length, 0] < 1
    assert abs(figures(found, "nll_drop")[length, 0]) < 2 < figures(found, "nll_drop")[length, 1]


def test_an_untrained_model_is_at_chance(english):
    tokenizer, dataset = english
    model = Llama(tiny(vocab_size=600, max_position_embeddings=256, initializer_range=0.02), seed=1).eval()
    passkeys = Passkeys(tokenizer, dataset, candidates=4)
    found = passkey(model, passkeys, [passkeys.shortest + 20], depths=2, trials=40)
    assert set(figures(found, "exact_match").values()) == {0.0}
    for chosen in figures(found, "forced_choice").values():
        assert 0.25 - 0.2 < chosen < 0.25 + 0.2  # three standard errors of forty choices
    for drop in figures(found, "nll_drop").values():
        assert abs(drop) < 0.5


def test_seeds_and_settings_determine_everything(english):
    tokenizer, dataset = english
    first, again, other = (Passkeys(tokenizer, dataset, seed=seed) for seed in (3, 3, 4))
    assert first.trial(200, 1) == again.trial(200, 1)
    assert len({str(trial) for trial in (first.trial(200, 1), first.trial(200, 2), other.trial(200, 1))}) == 3
    model = Llama(tiny(vocab_size=600, max_position_embeddings=256), seed=1).eval()
    results = [passkey(model, keys, [keys.shortest], 2, 2)["cells"] for keys in (first, again, other)]
    assert results[0] == results[1] != results[2]


@given(st.integers(0, 200), st.integers(0, 50), st.floats(0, 1))
def test_texts_of_a_trial(english, more, number, depth):
    tokenizer, dataset = english
    passkeys = Passkeys(tokenizer, dataset)
    length = passkeys.shortest + more
    trial = passkeys.trial(length, number)
    text, without = trial.text(depth), trial.text(None)
    assert len(text) == len(without) == length - max(map(len, trial.answers))
    assert text[0] == without[0] == tokenizer.bos_id
    key = tokenizer.decode([*trial.question, *trial.answers[0]]).split()[-1]
    assert tokenizer.decode(text).count(key) == 2
    assert key not in tokenizer.decode(without)
    at = len(trial.introduction) + round(depth * (len(trial.filler) - len(trial.needle)))
    assert text[at : at + len(trial.needle)] == trial.needle
    rest = text[:at] + text[at + len(trial.needle) :]
    assert rest == [*trial.introduction, *trial.filler[: -len(trial.needle)], *trial.question]
    assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(trial.filler)
    assert len({tuple(answer) for answer in trial.answers}) == passkeys.candidates


def test_only_the_key_is_the_answer(opened):
    tokenizer, dataset = opened
    passkeys = Passkeys(tokenizer, dataset)
    trial = passkeys.trial(400, 0)
    key, another = trial.answers[:2]
    digit = tokenizer.encode_batch(["7"])[0].tolist()[-1:]
    stop = tokenizer.encode_batch(["."])[0].tolist()[-1:]
    assert passkeys.is_answer(trial, key)
    assert passkeys.is_answer(trial, [*key, *stop])
    assert passkeys.is_answer(trial, [*key, tokenizer.eos_id])
    assert not passkeys.is_answer(trial, [*key, *digit])
    assert not passkeys.is_answer(trial, key[:-1])
    assert not passkeys.is_answer(trial, another)


def test_a_tokenizer_that_joins_question_and_answer(english):
    """Two characters a token: the question's last one belongs to the answer where its length is odd."""
    _, dataset = english
    pieces: dict[str, int] = {}

    def encode_batch(texts):
        cut = [[text[i : i + 2] for i in range(0, len(text), 2)] for text in texts]
        return [np.array([pieces.setdefault(piece, len(pieces)) for piece in ids]) for ids in cut]

    pairs = SimpleNamespace(encode_batch=encode_batch, bos_id=None)
    for language, phrases in PHRASES.items():
        trial = Passkeys(pairs, dataset, language).trial(400, 0)
        spelled = ["".join(list(pieces)[i] for i in [*trial.question, *answer]) for answer in trial.answers]
        assert all(text.startswith(phrases.question) for text in spelled)
        assert len(set(spelled)) == 10
        assert len(trial.question) == len(phrases.question) // 2


def test_filler_is_text_of_the_rows_that_may_be_read(english):
    tokenizer, dataset = english
    (source,) = dataset.sources
    first = dataset.row(source, 0)
    allowed = set(first.ids[: first.seg_len.sum()].tolist()) - {tokenizer.bos_id, tokenizer.eos_id}
    assert set(Filler(dataset, max_samples=1).draw(np.random.default_rng(0), 500)) == allowed
    everything = Filler(dataset, None).draw(np.random.default_rng(0), 5000)
    assert len(everything) == 5000
    assert set(everything) > allowed


def test_the_language_is_that_of_the_data(english, chinese):
    assert [Passkeys(*data).language for data in (english, chinese)] == ["en", "zh"]
    assert Passkeys(*english, language="zh").language == "zh"
    assert language_of("") == language_of("I saw 中 once upon a time.") == "en"


def test_default_lengths_end_with_the_row():
    assert default_lengths(4096) == [1024, 2048, 4096]
