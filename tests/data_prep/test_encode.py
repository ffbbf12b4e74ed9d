import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.encode import Disagreement, Encoder, UnitEncoder, Work, awkward_texts, choose_encoder
from data_prep.ledger import unit_path
from data_prep.sources import parse_sources, plan_units
from data_prep.tokenizer import open_tokenizer
from data_prep.unit_file import unit_schema
from tests.data_prep.builds import ROOT
from tests.data_prep.texts import DEEPSEEK, MISTRAL, PROSE, awkward, write_prose


@pytest.fixture(scope="module", params=["trained", "mistral", "deepseek"])
def each_tokenizer(request, tokenizer):
    return (
        tokenizer if request.param == "trained" else open_tokenizer(MISTRAL if request.param == "mistral" else DEEPSEEK)
    )


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    path = write_prose(tmp_path_factory.mktemp("input") / "a.jsonl", copies=3)
    return plan_units(parse_sources([str(path)], []), 200_000)[:2]


@pytest.fixture(scope="module")
def accelerated(each_tokenizer, planned):
    form, reason = choose_encoder("accelerated", each_tokenizer, *planned, ("text", None))
    assert "identical on" in reason
    return Encoder(each_tokenizer, form)


@given(texts=st.lists(awkward, min_size=1, max_size=5))
def test_every_document_has_one_beginning_and_one_end(each_tokenizer, texts):
    ids, lengths = Encoder(each_tokenizer).encode(texts)
    assert ids.dtype == each_tokenizer.dtype
    plain = each_tokenizer.encode_batch(texts)
    for document, inner in zip(np.split(ids, np.cumsum(lengths)[:-1]), plain, strict=True):
        assert document.tolist() == [each_tokenizer.bos_id, *inner, each_tokenizer.eos_id]


@given(texts=st.lists(awkward, min_size=1, max_size=5))
def test_accelerated_ids_are_the_tokenizers(accelerated, each_tokenizer, texts):
    for fast, exact in zip(accelerated.encode(texts), Encoder(each_tokenizer).encode(texts), strict=True):
        assert np.array_equal(fast, exact)


def test_accelerated_ids_of_prose(accelerated, each_tokenizer):
    texts = [*PROSE, *awkward_texts(each_tokenizer, 2000), "".join(PROSE)]
    assert np.array_equal(accelerated.encode(texts)[0], Encoder(each_tokenizer).encode(texts)[0])
    accelerated.check(texts)


def test_an_id_outside_the_vocabulary_is_never_stored(planned, tokenizer):
    foreign, _ = choose_encoder("accelerated", open_tokenizer(DEEPSEEK), *planned, ("text", None))
    with pytest.raises(Disagreement):
        Encoder(tokenizer, foreign).encode(PROSE)
    lying = open_tokenizer(tokenizer.path)
    lying.vocab_size = 300
    with pytest.raises(ValueError, match=r"gave id \d+, outside its vocabulary"):
        Encoder(lying).encode(PROSE)


def work_for(planned, tokenizer_file, folder, accelerated=None):
    return Work(folder, tokenizer_file, "plan", planned[1], "text", None, 0, "fail", accelerated)


def test_a_unit_in_which_the_accelerated_encoder_disagrees_is_redone(tmp_path, planned, tokenizer):
    foreign, _ = choose_encoder("accelerated", open_tokenizer(MISTRAL), *planned, ("text", None))
    with pytest.raises(Disagreement):
        Encoder(tokenizer, foreign).check(PROSE)
    ledgers = []
    for name, form in (("plain", None), ("fast", foreign)):
        (tmp_path / name).mkdir()
        encoder = UnitEncoder(work_for(planned, tokenizer.path, tmp_path / name, form), lambda *_: None)
        ledgers.append(encoder.run(planned[0][1]))
    assert [ledger.disagreed for ledger in ledgers] == [False, True]
    assert ledgers[0].sha256 == ledgers[1].sha256


def test_without_gigatoken_the_tokenizer_does_the_work(tmp_path, tokenizer):
    path = write_prose(tmp_path / "a.jsonl")
    program = (
        "import sys; sys.modules['gigatoken'] = None\n"
        "from data_prep.build import main; from console.command import run_command; run_command(main)"
    )
    words = [sys.executable, "-c", program, "--input", path, "--tokenizer", tokenizer.path, "--seq-length", "64"]
    for wanted, status, message in (
        ("auto", 0, "encoder: the tokenizer itself (gigatoken is not installed)"),
        ("accelerated", 2, "error: --encoder accelerated: gigatoken is not installed"),
    ):
        more = ["--output", tmp_path / wanted, "--encoder", wanted, "--workers", "1"]
        done = subprocess.run(list(map(str, words + more)), capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == status, done.stderr
        assert message in done.stderr


def test_a_tokenizer_that_gigatoken_cannot_use(tmp_path, planned):
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    model.add_special_tokens(["</s>"])
    model.save(str(tmp_path / "tokenizer.json"))
    form, reason = choose_encoder("auto", open_tokenizer(tmp_path), *planned, ("text", None))
    assert form is None
    assert "gigatoken" in reason


def test_rare_tokens_are_counted(tmp_path, tokenizer):
    text = "plain\n\ttext 龘 \U0010ffff"
    (tmp_path / "a.txt").write_text(text)
    units, files, _ = plan_units(parse_sources([str(tmp_path / "a.txt")], []))
    (tmp_path / "tokens").mkdir()
    ledger = UnitEncoder(work_for((units, files), tokenizer.path, tmp_path / "tokens"), lambda *_: None).run(units[0])
    assert (ledger.fallback, ledger.unknown, ledger.text_bytes, ledger.documents) == (7, 0, len(text.encode()), 1)
    assert ledger.file_bytes == unit_path(tmp_path / "tokens", 0).stat().st_size
    assert unit_schema(tokenizer.dtype).field("tokens").type.value_type == "uint16"
