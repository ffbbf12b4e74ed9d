"""`data_prep.verify` and `data_prep.inspect` on a data set that the real build made from real text."""

import os
import pydoc_data.topics
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from console.command import run_command
from data_prep import inspect, verify
from data_prep.build import build
from data_prep.plan import BuildOptions, Plan
from data_prep.repack import repack
from data_prep.sources import parse_sources
from data_prep.store import TokenStore
from data_prep.tokenizer import open_tokenizer
from data_prep.tokenizer_training import train
from storage.manifest import PackingPolicy
from storage.shards import open_split

TEXTS = dict(sorted(pydoc_data.topics.topics.items())[:30])
POEMS = {
    "haiku": "an old silent pond [bold]\na frog jumps in\n",
    "twin": "the same text twice\n",
    "zwilling": "the same text twice\n",
}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("verify")
    for folder, texts in (("manual", TEXTS), ("poems", POEMS)):
        (root / folder).mkdir()
        for name, text in texts.items():
            (root / folder / f"{name}.txt").write_text(text)
    (root / "tokenizer.model").write_bytes(train(TEXTS.values(), 600))
    (root / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer = open_tokenizer(root / "tokenizer.model")
    sources = parse_sources([], [f"{name}={root / name}:1" for name in ("manual", "poems")])
    options = BuildOptions(packing=PackingPolicy(seq_length=128, overlap=8), validation_fraction=0.1, deduplicate=True)
    build(Plan(sources, options, tokenizer), tokenizer, root / "data")
    return root / "data"


@pytest.fixture
def data(pristine, tmp_path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "data"))


@pytest.fixture
def command(monkeypatch, capsys):
    def run(module, *arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            run_command(module.main)
        return (end.value.code, *capsys.readouterr())

    return run


def test_an_intact_data_set_passes_both_ways(pristine, command):
    fingerprint = open_split(pristine, "train").manifest.fingerprint
    for flags in ([], ["--full"]):
        code, output, errors = command(verify, pristine, *flags)
        assert (code, errors) == (0, "")
        assert f"{pristine} is intact" in output
        assert fingerprint in output


def remove(path: Path) -> None:
    path.unlink()


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


TEMPLATE = "tokenizer/chat_template.jinja"
SHARD, UNIT, TOKENIZER = "train/shard-manual-00000.arrow", "tokens/unit-00000.arrow", "tokenizer/tokenizer.model"
QUICK_DAMAGE = [
    (remove, "manifest.json", "not a prepared data set"),
    (flip_bit, "manifest.json", "manifest.json"),
    (remove, SHARD, "shard-manual-00000.arrow is missing"),
    (shorten, SHARD, "shard-manual-00000.arrow is 1 bytes shorter"),
    (remove, TOKENIZER, "tokenizer.model is missing"),
    (flip_bit, TOKENIZER, "tokenizer.model is not the tokenizer that made this data set"),
    (remove, TEMPLATE, "chat_template.jinja is missing: it belongs to the tokenizer"),
    (flip_bit, TEMPLATE, "chat_template.jinja has changed since the data set was made"),
    (remove, "train/state.json", "state.json cannot be read"),
    (shorten, "train/state.json", "state.json cannot be read"),
    (remove, UNIT, "unit-00000.arrow is missing"),
    (shorten, UNIT, "unit-00000.arrow has"),
    (remove, "tokens/unit-00000.json", "unit-00000.json, the ledger of unit-00000.arrow, is missing or damaged"),
    (remove, "tokens/index.arrow", "is not a complete token store"),
]


@pytest.mark.parametrize(("damage", "file", "sentence"), QUICK_DAMAGE)
def test_each_damage_is_named(data, command, damage, file, sentence):
    damage(data / file)
    code, output, errors = command(verify, data)
    assert code == 2
    assert output == ""
    assert sentence in errors
    assert errors.startswith("error: ")
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize("file", [SHARD, UNIT])
def test_a_flipped_bit_needs_full(data, command, file):
    flip_bit(data / file)
    assert command(verify, data)[0] == 0
    code, _, errors = command(verify, data, "--full")
    assert code == 2
    assert f"{Path(file).name} has changed: its sha256 is not" in errors


def test_all_problems_are_reported_at_once(data, command):
    remove(data / SHARD)
    shorten(data / UNIT)
    flip_bit(data / TOKENIZER)
    for path in data.glob("tokens/unit-00001.*"):
        path.unlink()
    errors = command(verify, data)[2].splitlines()
    assert len(errors) == 4
    assert "lacks units" in errors[-1]


def test_a_data_set_without_token_store_is_intact(data, command):
    shutil.rmtree(data / "tokens")
    assert command(verify, data)[0] == 0
    assert command(inspect, data, "--row", 0)[0] == 0
    code, _, errors = command(inspect, data, "--document", 0)
    assert code == 2
    assert "documents cannot be shown" in errors


def test_overview_names_every_source_and_the_fingerprint(pristine, command):
    manifest = open_split(pristine, "train").manifest
    code, output, _ = command(inspect, pristine)
    assert code == 0
    assert manifest.fingerprint in output
    for split, sources in manifest.splits.items():
        for name, entry in sources.items():
            lines = [line for line in output.splitlines() if split in line and name in line]
            assert len(lines) == 1
            assert f"{entry.tokens:,}" in lines[0]


@pytest.mark.parametrize("key", ["assert.txt", "haiku.txt"])
def test_a_document_by_key_or_number_is_its_text(pristine, command, key):
    text = (TEXTS | POEMS)[Path(key).stem]
    code, output, _ = command(inspect, pristine, "--document", key)
    assert code == 0
    assert text in output
    number = output.split()[1].rstrip(",")
    assert command(inspect, pristine, "--document", number)[1] == output


def test_a_removed_duplicate_is_called_that(pristine, command):
    outputs = [command(inspect, pristine, "--document", f"{name}.txt")[1] for name in ("twin", "zwilling")]
    assert ["exact duplicate (1.000, of document " in output for output in outputs] == [False, True]


def test_a_row_is_its_documents_with_provenance(pristine, command):
    dataset = open_split(pristine, "train")
    tokenizer = open_tokenizer(pristine / "tokenizer")
    for number in range(0, dataset.rows_per_source["manual"], 7):
        code, output, _ = command(inspect, pristine, "--row", number, "--source", "manual")
        assert code == 0
        assert command(inspect, pristine, "--row", number)[1] == output
        row = dataset.row("manual", number)
        for length, context, doc, offset in zip(*(column.tolist() for column in row[1:]), strict=True):
            line = next(line for line in output.splitlines() if f"document {doc}, key " in line)
            assert f"its tokens {offset:,}-{offset + length - 1:,} of " in line
            assert (f"the first {context} of them context" in line) == bool(context)
        plain = output.replace("⟦", "").replace("⟧", "")
        pieces = np.split(row.ids, np.cumsum(row.seg_len))[:-1]
        assert all(tokenizer.decode(piece) in plain for piece in pieces)
        assert ("padding" in output.splitlines()[-1]) == (row.seg_len.sum() < len(row.ids))


def cuts_shown(output: str) -> list[tuple[int, str, str, str]]:
    """Position, kind, text before and text after of every cut."""
    lines = re.findall(r"^cut before token ([\d,]+) \((\w+)\): …(.*) ✂ (.*)…$", output, re.MULTILINE)
    return [(int(at.replace(",", "")), kind, before, after) for at, kind, before, after in lines]


@pytest.mark.parametrize("cut", ["exact", "structure"])
def test_cuts_are_shown_with_their_kind_and_both_sides(pristine, tmp_path, command, cut):
    tolerance = {} if cut == "exact" else {"cut_tolerance": 0.3}
    repack(pristine, PackingPolicy(seq_length=128, overlap=8, cut=cut, **tolerance), tmp_path / "data")
    dataset, store = open_split(tmp_path / "data", "train"), TokenStore.open(tmp_path / "data" / "tokens")
    pieces = {
        (doc, off): (row, length)
        for row in range(dataset.rows_per_source["manual"])
        for length, doc, off in zip(
            *(c.tolist() for c in (dataset.row("manual", row)[i] for i in (1, 3, 4))), strict=True
        )
    }
    kinds = Counter()
    for number in range(len(store)):
        if store.split(number) != "train" or store.source(number) != "manual":
            continue
        text, output = TEXTS[Path(store.key(number)).stem], command(inspect, tmp_path / "data", "--document", number)[1]
        cuts = cuts_shown(output)
        ends = [off + length for (doc, off), (_, length) in pieces.items() if doc == number]
        assert [at for at, *_ in cuts] == sorted(end for end in ends if end < len(store.tokens(number)))
        for _, kind, before, after in cuts:
            assert (before + after).replace("⏎", "\n").replace("\ufffd", "").strip() in text
            if kind in ("paragraph", "line"):
                assert before.rstrip(" ").endswith("⏎⏎" if kind == "paragraph" else "⏎")
            kinds[kind] += 1
        if cuts:
            row = next(row for (doc, off), (row, _) in pieces.items() if doc == number and off)
            shown = cuts_shown(command(inspect, tmp_path / "data", "--row", row, "--source", "manual")[1])
            assert set(cuts) & set(shown)
    counted = dataset.manifest.statistics["rows"]["train"]["cuts"]
    assert {kind: n for kind, n in counted.items() if n} == kinds
    assert (kinds["hard"] > kinds.total() / 2) == (cut == "exact")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--row", "99999"], "there is no row 99999: split train has"),
        (["--row", "-1"], "there is no row -1"),
        (["--row", "0", "--split", "tset"], "no split 'tset': it has"),
        (["--row", "0", "--source", "novels"], "split train has no source 'novels': it has manual, poems"),
        (["--document", "nothing.txt"], "no document with the key 'nothing.txt'"),
        (["--document", "99999"], "no document with the key '99999'"),
    ],
)
def test_what_is_not_there_is_said(pristine, command, arguments, sentence):
    code, output, errors = command(inspect, pristine, *arguments)
    assert (code, output) == (2, "")
    assert sentence in errors
    assert len(errors.splitlines()) == 1
