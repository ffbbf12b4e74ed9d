"""Whatever is wrong with a tokenizer's folder ends in one sentence that names the file, and the key where there is one."""

import base64
import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from data_prep.token_bytes import token_bytes
from data_prep.tokenizer import open_tokenizer
from data_prep.tokenizer_files import TokenizerConfig
from tests.data_prep.builds import arguments, failure, run
from tests.data_prep.texts import PROSE
from tests.properties import examples

TEXTS = ["Hello wörld 123 \n</s><|im_end|>", "", " ", "a" * 5000]

anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["</s>", "<|im_end|>", "left", "a"]),
    st.lists(st.one_of(st.none(), st.integers(), st.text(max_size=3), st.just({"content": "a"})), max_size=2),
    st.dictionaries(
        st.sampled_from(["content", "a", "0", "7", "default"]), st.one_of(st.integers(), st.text(max_size=3))
    ),
)
KEYS = sorted([*TokenizerConfig.model_fields, "auto_map", "sp_model_kwargs", "added_tokens", "unheard_of"])
FILES = ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"]


def byte_level(folder: Path, special: tuple[str, ...] = ("</s>",), entries: int = 300) -> Path:
    """A byte-level BPE tokenizer.json."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=entries, initial_alphabet=alphabet, show_progress=False, special_tokens=list(special)
    )
    model.train_from_iterator(PROSE[:20], trainer)
    folder.mkdir(exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module", params=["huggingface", "sentencepiece"])
def folder(request, tokenizer_folder, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("folder")
    if request.param == "huggingface":
        return byte_level(place)
    shutil.copy(tokenizer_folder / "tokenizer.model", place)
    return place


def opened_or_sentence(folder: Path, file: Path) -> str | None:
    """None when the folder can be used for all that a build does with it, else the sentence."""
    try:
        tokenizer = open_tokenizer(folder)
        ids = tokenizer.encode_batch(TEXTS)
        assert all(int(one.max(initial=0)) < tokenizer.vocab_size for one in ids)
        assert len(token_bytes(tokenizer)) == tokenizer.vocab_size
        tokenizer.decode(ids[0])
        assert open_tokenizer(tokenizer.save(folder.with_name("copy"))).info("") == tokenizer.info("")
        sentence = None
    except ValueError as error:
        sentence = str(error)
    finally:
        shutil.rmtree(folder.with_name("copy"), ignore_errors=True)
    assert sentence is None or (str(file) in sentence and "\n" not in sentence)
    return sentence


@examples(150)
@given(file=st.sampled_from(FILES), key=st.sampled_from(KEYS), value=anything)
def test_any_value_of_any_key_is_used_or_named(folder, file, key, value):
    place = folder / file
    place.write_text(json.dumps({key: value}))
    try:
        found = opened_or_sentence(folder, place)
    finally:
        place.unlink()
    if found is not None:
        assert file != "generation_config.json"  # the model's, not the tokenizer's
        assert key in found


@examples(60)
@given(
    file=st.sampled_from(FILES[:3]),
    content=st.one_of(st.binary(max_size=40), anything.map(lambda v: json.dumps(v).encode())),
)
def test_files_that_hold_anything_else_are_named(folder, file, content):
    place = folder / file
    place.write_bytes(content)
    try:
        opened_or_sentence(folder, place)
    finally:
        place.unlink()


@examples(100)
@given(data=st.data())
def test_damaged_tokenizers_are_used_or_named(folder, tmp_path_factory, data):
    (main,) = [file for file in folder.iterdir() if file.is_file() and file.name.startswith("tokenizer.")]
    content = bytearray(main.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 5))):
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    place = tmp_path_factory.mktemp("damaged") / main.name
    place.write_bytes(content)
    opened_or_sentence(place.parent, place)


def test_every_other_fault_is_named(tmp_path):
    base = byte_level(tmp_path / "base")
    config, by_map = "tokenizer_config.json", "special_tokens_map.json"
    no_entries = tokenizers.Tokenizer(models.BPE()).to_str()
    unknown_end = "eos_token '<x>' is not in the vocabulary of"
    faults = [
        ({config: '{"eos_token": "<x>"}'}, f"{config}: {unknown_end}"),
        ({by_map: '{"eos_token": {"content": "<x>"}}'}, f"{by_map}: {unknown_end}"),
        ({config: "[]"}, "is not a JSON object, {...}, but list"),
        ({config: b'{"a": "\xff"}'}, f"{config} is not valid JSON"),
        ({config: "[" * 200_000}, f"{config} is not valid JSON"),
        ({"chat_template.jinja": b"\xff"}, "chat_template.jinja cannot be read as text"),
        ({"tokenizer.json": ""}, "tokenizer.json is empty"),
        ({"tokenizer.json": None}, "tokenizer.json cannot be read: Is a directory"),
        ({config: None}, f"{config} is a folder, not a file"),
        ({"tokenizer.json": no_entries}, "tokenizer.json has 0 entries"),
        ({"tokenizer.json": "x", "tokenizer.model": "y"}, "tokenizer.model is not a SentencePiece model; "),
        ({"added_tokens.json": '{"<x>": "1"}'}, "added_tokens.json: <x>: Input should be a valid integer"),
    ]
    for number, (files, words) in enumerate(faults):
        place = Path(shutil.copytree(base, tmp_path / str(number)))
        for file, content in files.items():
            if content is None:
                (place / file).unlink(missing_ok=True)
                (place / file).mkdir()
            else:
                (place / file).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ValueError) as error:
            open_tokenizer(place)
        assert words in str(error.value)
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="?"))
    words.save(str(base / "tokenizer.json"))
    (base / config).write_text('{"eos_token": "</s>"}')
    with pytest.raises(ValueError, match="cannot encode every text: WordLevel error: Missing"):
        open_tokenizer(base).encode_batch(["b"])


def test_what_a_sentencepiece_model_has_otherwise_than_the_files_say_is_told(tmp_path, tokenizer_folder):
    shutil.copy(tokenizer_folder / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>", "pad_token": "<pad>"}')
    told = f"{tmp_path}/tokenizer_config.json names '<|im_end|>' as eos_token, tokenizer.model '</s>'"
    assert open_tokenizer(tmp_path).notices == [told]


def test_of_a_folder_with_two_the_good_one_is_taken_and_said(tmp_path, prose):
    place = byte_level(tmp_path / "both")
    (place / "tokenizer_config.json").write_text('{"eos_token": "</s>", "pad_token": "<nowhere>"}')
    ranks = (base64.b64encode(bytes([byte])).decode() + f" {byte}\n" for byte in range(256))
    (place / "tokenizer.model").write_text("".join(ranks))  # of tiktoken's form, as Llama 3 was distributed
    done = run("build", *arguments(prose, place, tmp_path / "data"))
    assert done.returncode == 0, done.stderr
    assert f"{place}/tokenizer.model is not a SentencePiece model; tokenizer.json is taken" in done.stderr
    assert "pad_token '<nowhere>' is not in the vocabulary of tokenizer.json and left out" in done.stderr
    assert sorted(file.name for file in (tmp_path / "data/tokenizer").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    (place / "tokenizer_config.json").write_text('{"eos_token": ["</s>"]}')
    sentence = failure(run("build", *arguments(prose, place, tmp_path / "no")))
    assert sentence.count('tokenizer_config.json: eos_token: expected a string, or an object with "content"') == 1
