"""Tokens that are named but are no entries of the tokenizer are said at the build and at the start of a training."""

import io
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece

from data_prep.repack import repack
from storage.manifest import PackingPolicy, fingerprint, read_manifest
from tests.data_prep.test_tokenizer_files import byte_level
from tests.data_prep.texts import PROSE
from tests.tools.test_export_foreseen import SHORT, plan_of
from tests.tools.trained import build_data, write_documents
from tools.hf_tokenizer import write_hf_tokenizer

NAMED = {
    "tokenizer_config.json": {"eos_token": "</s>", "pad_token": "<pad>", "extra_special_tokens": {"image": "<image>"}},
    "special_tokens_map.json": {"additional_special_tokens": ["<tag>", {"content": "<pad>"}], "unk_token": "</s>"},
    "added_tokens.json": {"<added>": 500, "</s>": 0},
}
NAMES = "<added>, <image>, <pad>, <tag>"
KEYS = ("tokenizer_names_without_entry", "tokenizer_needs_own_code")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("documents")
    return f"documents={write_documents(folder / 'documents.jsonl', PROSE[:40])}"


def of_an_earlier_version(data: Path) -> None:
    """Its manifest says nothing of an export."""
    content = json.loads((data / "manifest.json").read_bytes())
    for key in KEYS:
        content["statistics"].pop(key, None)
    content["fingerprint"] = fingerprint(content)
    (data / "manifest.json").write_text(json.dumps(content))


def said(plan) -> list[str]:
    return [line for line in plan.warnings if "an export of the model" in line]


@pytest.mark.parametrize("kind", ["huggingface", "sentencepiece"])
def test_names_without_an_entry(source, tokenizer, tmp_path, capsys, kind):
    given = tmp_path / "given"
    byte_level(given)
    if kind == "sentencepiece":
        shutil.copy(tokenizer, given / "tokenizer.model")
        (given / "tokenizer.json").unlink()
    for file, content in NAMED.items():
        (given / file).write_text(json.dumps(content))
    main = "tokenizer.json" if kind == "huggingface" else "tokenizer.model"
    names = NAMES if kind == "huggingface" else NAMES.replace("<pad>, ", "")
    words = f"no entries for tokens that the files beside it name ({names})"
    capsys.readouterr()
    data = build_data([source], given, tmp_path / "data", SHORT, validation_fraction=0)
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"{given / main} has {words}")]
    repack(data, PackingPolicy(seq_length=SHORT // 2), tmp_path / "again")
    assert f"has {words}" in capsys.readouterr().err
    entries = read_manifest(data).tokenizer.vocab_size
    (first,) = said(plan_of(tmp_path, data, model={"vocab_size": entries}))
    assert first == f"{data}: the tokenizer has {words}: an export of the model leaves them out"
    (roomy,) = said(plan_of(tmp_path, data, model={"vocab_size": entries + 64}))
    assert roomy == f"{first}, unless it finds room for them in the 64 entries that model.vocab_size has more"
    info = read_manifest(data).tokenizer
    written = write_hf_tokenizer(info, data / info.file, tmp_path / "out", 128)
    assert written.notice == f"left out, being no entries of the tokenizer: {names}"

    of_an_earlier_version(data)
    assert said(plan_of(tmp_path, data, model={"vocab_size": entries})) == [first]
    shutil.rmtree(data / "tokenizer")  # which a training does without
    assert said(plan_of(tmp_path, data, model={"vocab_size": entries})) == []


def test_an_earlier_build_with_a_tokenizer_that_transformers_lacks(source, tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE[:40]), model_writer=model, model_type="unigram", vocab_size=300, minloglevel=2
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    data = build_data([source], tmp_path / "tokenizer.model", tmp_path / "data", SHORT, validation_fraction=0)
    now = said(plan_of(tmp_path, data))
    assert len(now) == 1
    of_an_earlier_version(data)
    assert said(plan_of(tmp_path, data)) == now
    assert read_manifest(data).statistics.keys().isdisjoint(KEYS)


def test_nothing_is_said_of_others(source, tokenizer, tmp_path, capsys):
    capsys.readouterr()
    data = build_data([source], tokenizer, tmp_path / "data", SHORT, validation_fraction=0)
    assert "export" not in capsys.readouterr().err
    assert read_manifest(data).statistics["tokenizer_names_without_entry"] == []
    assert said(plan_of(tmp_path, data)) == []
    of_an_earlier_version(data)
    assert said(plan_of(tmp_path, data)) == []
