import json

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given

from data_prep.tokenizer import open_tokenizer
from data_prep.tokenizer_files import CONFIG_FILE
from data_prep.tokenizer_training import train
from tests.data_prep.builds import run
from tests.data_prep.texts import DEEPSEEK, MISTRAL, PROSE, awkward
from tests.properties import examples


@pytest.fixture(scope="module", params=["trained", "mistral", "deepseek"])
def each_tokenizer(request, tokenizer):
    return {"trained": lambda: tokenizer}.get(
        request.param, lambda: open_tokenizer({"mistral": MISTRAL, "deepseek": DEEPSEEK}[request.param])
    )()


def control_ids(tokenizer) -> set[int]:
    return {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id} - {None}


@examples(150)
@given(text=awkward)
def test_text_never_yields_a_control_id_and_survives(each_tokenizer, text):
    (ids,) = each_tokenizer.encode_batch([text])
    assert not control_ids(each_tokenizer) & set(ids.tolist())
    if "▁" not in text:  # SentencePiece's own sign for a space
        assert each_tokenizer.decode(ids) == text


@examples(40)
@given(text=awkward)
def test_long_texts_have_the_ids_of_plain_encode(tokenizer, text):
    reference = sentencepiece.SentencePieceProcessor(str(tokenizer.path))
    text = (text + "a b\n") * (5000 // (len(text) + 4) + 1)
    texts = [text, text[:10], text + "x"]
    for ids, one in zip(tokenizer.encode_batch(texts), texts, strict=True):
        assert np.array_equal(ids, reference.encode(one))


def test_trained_tokenizer(tokenizer):
    ids = [tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id]
    assert ids == [0, 1, 2, 3, 4]
    assert (tokenizer.vocab_size, tokenizer.dtype, len(tokenizer.fallback_ids)) == (1200, np.uint16, 253)
    digits = tokenizer.encode_batch(["x2025"])[0]
    assert [tokenizer.decode([i]) for i in digits[-4:]] == ["2", "0", "2", "5"]
    assert tokenizer.decode(tokenizer.encode_batch(["  two  spaces \n\n ﬁ"])[0]) == "  two  spaces \n\n ﬁ"
    assert np.isin(tokenizer.encode_batch(["\n龘"])[0], tokenizer.fallback_ids).sum() == 3


def test_training_is_reproducible_and_uses_long_lines(tokenizer):
    assert train(PROSE, 1200) == tokenizer.path.read_bytes()
    one_line = " ".join(PROSE).replace("\n", " ")
    model = sentencepiece.SentencePieceProcessor(model_proto=train([one_line], 1200))
    assert len(model.encode(one_line)) < len(one_line) / 2


def test_mistral_model_nobody_here_trained():
    tokenizer = open_tokenizer(MISTRAL)
    assert tokenizer.encode_batch(["Hello world\n你好"])[0].tolist() == [22557, 1526, 13, 29383, 29530]
    assert (tokenizer.vocab_size, tokenizer.dtype) == (32000, np.uint16)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id) == (1, 2, 2, None)


def test_deepseek_vocabulary_needs_uint32():
    tokenizer, reference = open_tokenizer(DEEPSEEK.parent), tokenizers.Tokenizer.from_file(str(DEEPSEEK))
    assert (tokenizer.vocab_size, tokenizer.dtype) == (129280, np.uint32)
    assert tokenizer.bos_id == reference.token_to_id("<｜begin▁of▁sentence｜>")
    assert tokenizer.eos_id == reference.token_to_id("<｜end▁of▁sentence｜>")
    for ids, text in zip(tokenizer.encode_batch(PROSE), PROSE, strict=True):
        assert ids.tolist() == reference.encode(text, add_special_tokens=False).ids


def word_tokenizer(path, entries: int, **extra):
    vocabulary = {f"w{i}": i for i in range(entries - 1)} | {"</s>": entries - 1}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.enable_truncation(2)
    model.enable_padding(length=9)
    model.save(str(path))
    path.with_name("tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}} | extra))
    return open_tokenizer(path)


@pytest.mark.parametrize(("entries", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_dtype_follows_the_vocabulary(tmp_path, entries, dtype):
    tokenizer = word_tokenizer(tmp_path / "tokenizer.json", entries)
    assert (tokenizer.dtype, tokenizer.eos_id, tokenizer.bos_id) == (dtype, entries - 1, None)


def test_truncation_and_padding_of_a_tokenizer_json_are_ignored(tmp_path):
    tokenizer = word_tokenizer(tmp_path / "tokenizer.json", 100)
    assert tokenizer.encode_batch(["w1 w2 w3 w4"])[0].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("source", ["trained", "deepseek"])
def test_saved_copy_is_the_same_tokenizer(tmp_path, tokenizer, source):
    original = tokenizer if source == "trained" else open_tokenizer(DEEPSEEK)
    file = original.save(tmp_path / "copy")
    copy = open_tokenizer(tmp_path / "copy")
    assert copy.info("x") == original.info("x")
    assert file == copy.path
    assert source == "trained" or (tmp_path / "copy" / CONFIG_FILE).is_file()


def test_what_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "bad.model").write_bytes(b"nonsense")
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    word_tokenizer(tmp_path / "tokenizer.json", 10).path.with_name("tokenizer_config.json").unlink()
    for name, words in [
        ("bad.model", "not a SentencePiece model"),
        ("bad.json", "not a Hugging Face tokenizer"),
        ("empty", "neither tokenizer.model nor tokenizer.json"),
        ("nowhere", "there is no tokenizer"),
        ("tokenizer.json", "names no end-of-document token"),
    ]:
        with pytest.raises(ValueError, match=words):
            open_tokenizer(tmp_path / name)


def test_train_command(tmp_path, tokenizer):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number, text in enumerate(PROSE):
        (texts / f"{number:03}.txt").write_text(text)
    done = run("tokenizer", "train", "--input", texts, "--vocab-size", 1200, "--output", tmp_path / "tok")
    assert done.returncode == 0, done.stderr
    assert open_tokenizer(tmp_path / "tok").sha256 == tokenizer.sha256
    done = run("tokenizer", "train", "--input", texts, "--vocab-size", 99999, "--output", tmp_path / "tok2")
    assert done.returncode == 2
    assert "--vocab-size 99999 does not fit this text" in done.stderr
    assert done.stderr.count("error") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "tok2").exists()
