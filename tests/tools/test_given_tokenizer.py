"""A Hugging Face tokenizer that was given is the one that is exported: tokens, templates, padding and all."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from data_prep.foresee import absent_names
from data_prep.tokenizer import open_tokenizer
from model.config import ModelConfig
from model.hf.weights import save_hf
from model.llama import Llama
from tests.data_prep.test_tokenizer_files import FILES, KEYS, anything, byte_level
from tests.data_prep.texts import MISTRAL, PROSE
from tests.properties import examples
from tools.hf_tokenizer import Written, write_hf_tokenizer

LENGTH = 4096
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
WITH_TOOLS = "{{ tools }}" + CHAT
MESSAGES = [{"role": "user", "content": "Who <tag> is there?"}, {"role": "assistant", "content": "Nobody."}]
LITERALS = [*SPECIAL, "<tag>", "<|mask|>", "<|im_", " ", "  ", "\n", "the ", "Word", "é", "ﬁ", "_", "<", "a"]
texts = st.lists(st.one_of(st.sampled_from(LITERALS), st.text(max_size=5)), max_size=10).map("".join)
flags = st.fixed_dictionaries({name: st.booleans() for name in ("lstrip", "rstrip", "single_word", "normalized")})


@pytest.fixture(scope="module")
def backend() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(PROSE[:20], trainer)
    return tokenizer.to_str()


@st.composite
def folders(draw) -> tuple[dict, dict[str, str | dict]]:
    """What is to be done to the tokenizer of `backend`, and the files that lie beside it."""
    added = [(name, draw(flags) | {"special": True}) for name in SPECIAL]
    added.append(("<tag>", draw(flags) | {"special": draw(st.booleans())}))
    table = {
        "added": added,
        "normalizer": draw(st.sampled_from([None, "NFKC", "Lowercase"])),
        "begins": draw(st.booleans()),
        "padding": draw(st.sampled_from([None, "right", "left"])),
        "truncation": draw(st.sampled_from([None, 5])),
    }
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    names |= draw(st.sampled_from([{}, {"pad_token": "<|endoftext|>"}, {"pad_token": "<|im_end|>"}]))
    names |= draw(st.sampled_from([{}, {"additional_special_tokens": ["<|im_start|>", "<tag>"]}]))
    config = draw(st.sampled_from([{}, {"padding_side": "left"}, {"model_max_length": 7, "truncation_side": "left"}]))
    config |= draw(st.sampled_from([{}, {"clean_up_tokenization_spaces": True}, {"add_bos_token": True}]))
    kinds = ("PreTrainedTokenizerFast", "GPT2Tokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer", None)
    if (kind := draw(st.sampled_from(kinds))) is not None:
        config["tokenizer_class"] = kind
    files: dict[str, str | dict] = {}
    match draw(st.sampled_from(["none", "config", "names", "file", "folder"])):
        case "config":
            config["chat_template"] = CHAT
        case "names":
            named = {"default": CHAT, "tool_use": WITH_TOOLS}
            config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
        case "file":
            files["chat_template.jinja"] = CHAT
        case "folder":
            files |= {"chat_template.jinja": CHAT, "additional_chat_templates/tool_use.jinja": WITH_TOOLS}
    if draw(st.booleans()):
        return table, files | {"tokenizer_config.json": config | names}
    as_map = {key: {"content": token} if isinstance(token, str) else token for key, token in names.items()}
    return table, files | {"tokenizer_config.json": config, "special_tokens_map.json": as_map}


def put(folder: Path, backend: str, table: dict, files: dict[str, str | dict]) -> Path:
    folder.mkdir()
    tokenizer = Tokenizer.from_str(backend)
    tokenizer.add_tokens([AddedToken(name, **how) for name, how in table["added"]])
    if table["normalizer"]:
        tokenizer.normalizer = getattr(normalizers, table["normalizer"])()
    if table["begins"]:
        begin = tokenizer.token_to_id("<|im_start|>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|im_start|> $A", pair="<|im_start|> $A $B", special_tokens=[("<|im_start|>", begin)]
        )
    if table["padding"]:
        pad = tokenizer.token_to_id("<|endoftext|>")
        tokenizer.enable_padding(direction=table["padding"], pad_id=pad, pad_token="<|endoftext|>")
    if table["truncation"]:
        tokenizer.enable_truncation(table["truncation"])
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def export(
    source: Path, output: Path, file: str = "tokenizer.json", **options
) -> tuple[Written, PreTrainedTokenizerFast]:
    """Beside the config.json of a LLaMA, as `tools.export` does."""
    trained = open_tokenizer(source)
    output.mkdir(exist_ok=True)
    (output / "config.json").write_text('{"model_type": "llama"}')
    written = write_hf_tokenizer(trained.info(file), source / file, output, LENGTH, **options)
    return written, AutoTokenizer.from_pretrained(output)


@examples(30)
@given(drawn=folders(), some=st.lists(texts, min_size=1, max_size=5))
def test_it_behaves_as_the_one_that_was_given(backend, tmp_path_factory, drawn, some):
    place, (table, files) = tmp_path_factory.mktemp("given"), drawn
    source = put(place / "source", backend, table, files)
    trained, theirs = open_tokenizer(source), PreTrainedTokenizerFast.from_pretrained(source)
    written, loaded = export(source, place / "out")
    assert not written.own_code
    assert written.notice is None
    for text in [*some, "".join(SPECIAL), "a<|im_end|> b <tag> c"]:
        for special in (True, False):
            expected = theirs(text, add_special_tokens=special)["input_ids"]
            assert loaded(text, add_special_tokens=special)["input_ids"] == expected
        assert loaded.decode(expected) == theirs.decode(expected)
        ours = trained.encode_batch([text])[0].tolist()
        assert set(ours).isdisjoint(theirs.convert_tokens_to_ids(list(trained.control_strings)))
        assert loaded(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] == ours
    assert loaded.special_tokens_map == theirs.special_tokens_map
    assert loaded.all_special_ids == theirs.all_special_ids
    for key in ("padding_side", "truncation_side", "clean_up_tokenization_spaces", "chat_template", "pad_token_id"):
        assert getattr(loaded, key) == getattr(theirs, key)
    if theirs.chat_template:
        chat = theirs.apply_chat_template(MESSAGES, tokenize=True)["input_ids"]
        assert loaded.apply_chat_template(MESSAGES, tokenize=True)["input_ids"] == chat
        assert chat.count(trained.eos_id) == 2
    assert loaded.model_max_length == LENGTH  # the model's
    if table["truncation"]:  # and for who reads this file alone
        assert Tokenizer.from_file(str(place / "out/tokenizer.json")).truncation is None
    else:
        assert (place / "out/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    shutil.rmtree(place)


@pytest.mark.parametrize("has_bos", [True, False])
def test_what_surrounds_a_text_stays_and_what_is_no_entry_is_left_out(tmp_path, has_bos):
    names = ["<unk>", "</s>", "<bos>", "<tag>", *"abcdefgh"]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_tokens(["<tag>", "<bos>"])  # not special: only the names below make <bos> so
    words.post_processor = processors.TemplateProcessing(
        single="</s> $A </s>", pair="$A $B", special_tokens=[("</s>", 1)]
    )
    words.enable_truncation(3)
    words.enable_padding(length=9)  # with [PAD], which there is not
    words.save(str(tmp_path / "tokenizer.json"))
    beside = {"eos_token": "</s>", "model_max_length": 7, "additional_special_tokens": ["<tag>", "<no>"]}
    beside |= {"bos_token": {"content": "<bos>"}, "chat_template": "{{ x }}"} if has_bos else {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(beside))
    trained = open_tokenizer(tmp_path)
    written, loaded = export(tmp_path, tmp_path / "out")
    assert written.notice == "left out, being no entries of the tokenizer: <no>, [PAD]"
    assert absent_names(trained) == ["<no>", "[PAD]"]  # as the build says
    assert loaded("a b c d e f g h")["input_ids"] == [1, *range(4, 12), 1]
    some = ["a<tag>b", "a<bos>b", "<tag> <bos> </s>", "a <bos> b", "a </s>", "z"]
    exact = [ids.tolist() for ids in trained.encode_batch(some)]
    assert exact[:2] == [[4, 3, 5], [0] if has_bos else [4, 2, 5]]
    assert loaded(some, split_special_tokens=True)["input_ids"] == [[1, *ids, 1] for ids in exact]
    assert loaded("a<bos>b", add_special_tokens=False)["input_ids"] == [4, 2, 5]
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (trained.bos_id, 1, None)
    assert loaded.chat_template == beside.get("chat_template")
    table = json.loads((tmp_path / "out/tokenizer.json").read_text())
    assert (table["truncation"], table["padding"]) == (None, None)
    assert loaded.model_max_length == LENGTH


def test_tokens_beyond_the_tokenizer_have_their_ids_in_the_model(backend, tmp_path):
    """A mask token that only the model knows, and tokens that only tokenizer_config.json names, where the model has room."""
    special = [(name, {"special": True}) for name in SPECIAL]
    names = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<mask>", "<new>"]}
    table = {"added": special, "normalizer": None, "begins": False, "padding": None, "truncation": None}
    source = put(tmp_path / "source", backend, table, {"tokenizer_config.json": names})
    entries = open_tokenizer(source).vocab_size
    _, loaded = export(source, tmp_path / "masked", mask_id=entries, vocab_size=entries + 64)
    assert loaded.mask_token_id == entries
    assert loaded.encode(f"a{loaded.mask_token}b").count(entries) == 1
    written, loaded = export(source, tmp_path / "room", vocab_size=entries + 64)
    assert written.notice is None
    assert loaded.convert_tokens_to_ids(["<mask>", "<new>"]) == [entries, entries + 1]
    written, loaded = export(source, tmp_path / "none", vocab_size=entries)
    assert written.notice == "left out, being no entries of the tokenizer: <mask>, <new>"
    assert len(loaded) == entries


def test_a_model_of_sentencepiece_keeps_the_files_beside_it(tmp_path):
    """Its own ids; the names, flags and templates of the Hugging Face files."""
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(MISTRAL, source / "tokenizer.model")
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "padding_side": "right", "legacy": True}
    config |= {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": True}
    config |= {"chat_template": [{"name": "default", "template": "{{ bos_token }}" + CHAT}], "model_max_length": 1e30}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "special_tokens_map.json").write_text('{"unk_token": {"content": "<unk>", "normalized": true}}')
    written, loaded = export(source, tmp_path / "out", file="tokenizer.model")
    trained = open_tokenizer(source)
    text = "A text , with  spaces\n"
    assert (written.notice, written.adds_bos, written.own_code) == (None, True, False)
    assert loaded(text)["input_ids"] == [1, *trained.encode_batch([text])[0], 2]
    assert (loaded.pad_token, loaded.padding_side, loaded.model_max_length) == ("</s>", "right", LENGTH)
    assert loaded.apply_chat_template(MESSAGES, tokenize=True)["input_ids"][0] == 1
    assert (tmp_path / "out/tokenizer.model").read_bytes() == MISTRAL.read_bytes()  # for readers of this one


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return byte_level(tmp_path_factory.mktemp("plain"), entries=260)


@examples(40)
@given(files=st.dictionaries(st.sampled_from(FILES[:3]), st.dictionaries(st.sampled_from(KEYS), anything, max_size=2)))
def test_what_can_be_trained_with_can_be_exported(plain, tmp_path_factory, files):
    place = tmp_path_factory.mktemp("any")
    source = Path(shutil.copytree(plain, place / "source"))
    for name, content in files.items():
        (source / name).write_text(json.dumps(content))
    try:
        names = absent_names(open_tokenizer(source))
    except ValueError:  # said before any work
        return
    written, loaded = export(source, place / "out")
    assert {*names}.isdisjoint(loaded.get_vocab())
    assert written.notice in (None, f"left out, being no entries of the tokenizer: {', '.join(names)}")
    assert names or written.notice is None
    shutil.rmtree(place)


@pytest.mark.parametrize("kind", ["chat", "sentencepiece"])
def test_fine_tuning_on_a_chat_sees_the_end_of_every_turn(backend, tmp_path, kind):
    """One step of transformers' Trainer on an exported model, with the chat template and a collator that masks padding."""
    (source := tmp_path / "source").mkdir()
    if kind == "chat":
        table = Tokenizer.from_str(backend)
        table.add_special_tokens(list(SPECIAL))
        table.save(str(source / "tokenizer.json"))
        config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHAT}
    else:  # which has no padding
        shutil.copy(MISTRAL, source / "tokenizer.model")
        config = {"chat_template": CHAT.replace("<|im_start|>", "").replace("<|im_end|>", "{{ eos_token }}")}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    trained = open_tokenizer(source)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ModelConfig(vocab_size=trained.vocab_size, **size)
    ids = {f"{name}_token_id": getattr(trained, f"{name}_id") for name in ("bos", "eos", "pad")}
    save_hf(config, Llama(config).state_dict().items(), tmp_path / "out", token_ids=ids)
    write_hf_tokenizer(trained.info(""), source, tmp_path / "out", LENGTH, vocab_size=config.vocab_size)

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    chats = [MESSAGES, MESSAGES * 2]
    rows = [{"input_ids": tokenizer.apply_chat_template(chat, tokenize=True)["input_ids"]} for chat in chats]
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path / "sft"), max_steps=1, learning_rate=1e-2, use_cpu=True, report_to=[]),
        DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=rows,
    )
    (batch,) = trainer.get_train_dataloader()
    ends = batch["labels"] == trained.eos_id
    assert ends.sum() == sum(map(len, chats))
    assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)

    def likelihood() -> torch.Tensor:
        with torch.no_grad():
            return model(**batch).logits[:, :-1].log_softmax(-1)[..., trained.eos_id][ends[:, 1:]].mean()

    before = likelihood()
    assert math.isfinite(trainer.train().training_loss)
    assert likelihood() > before
