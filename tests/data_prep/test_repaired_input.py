"""After a failed build the same folder takes the remedy: finished units stay where their input is the same."""

import gzip
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import build as building
from data_prep import plan as planning
from data_prep.ledger import Ledger
from storage.manifest import PackingPolicy
from tests.data_prep.builds import build_here, contents, failure, run
from tests.data_prep.texts import write_lines
from tests.properties import examples

LEDGER = Ledger(unit=0, plan_sha256="0", input_sha256="0", sha256="0", file_bytes=0, documents=1).model_dump_json()
TEXTS = [f"text {number} of some words" for number in range(40)]


def good_files(folder, names="abc"):
    folder.mkdir(exist_ok=True)
    for name in names:
        write_lines(folder / f"{name}.jsonl", [{"text": f"{name} {text}", "body": "x"} for text in TEXTS])
    return folder


def units_of(output) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in (output / "tokens").glob("unit-*.arrow")}


def begun(folder, tokenizer, output, words, **options) -> dict[str, int]:
    """What a build that fails leaves finished."""
    with pytest.raises(ValueError, match=words):
        build_here([folder], tokenizer, output, **options)
    assert not (output / "manifest.json").exists()
    before = units_of(output)
    assert before
    return before


DAMAGE = {
    "c.jsonl": (b'{"text": "x"}\nnonsense\n', b'{"text": "x"}\n{"text": "repaired"}\n'),
    "c.jsonl.gz": (gzip.compress(b'{"text": "x"}\n' * 9, mtime=0)[:-9], gzip.compress(b'{"text": "x"}\n' * 9, mtime=0)),
    "c.csv": (b"words\nx\n", b"text\nx\n"),
    "c.txt": (b"\xff\xff\xff", "äöü".encode()),
    "c.json": (b'[{"text": "x"}, ', b'[{"text": "x"}]'),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("unit_bytes", [None, 300])
def test_a_repaired_file_leads_on(tmp_path, tokenizer_folder, name, unit_bytes, capsys):
    folder, output = good_files(tmp_path / "documents", "ab"), tmp_path / "data"
    damaged, repaired = DAMAGE[name]
    (folder / name).write_bytes(damaged)
    before = begun(folder, tokenizer_folder, output, rf"{name}.*--on-error skip", unit_bytes=unit_bytes)
    (folder / name).write_bytes(repaired)
    capsys.readouterr()
    build_here([folder], tokenizer_folder, output, unit_bytes=unit_bytes)
    said = capsys.readouterr().err
    assert said.count("takes this one") == 1
    kept = int(re.search(r"takes this one: (\d+) of its", said)[1])
    assert kept == sum(units_of(output).get(unit) == inode for unit, inode in before.items()) == len(before)
    build_here([folder], tokenizer_folder, tmp_path / "fresh", unit_bytes=unit_bytes)
    assert contents(output) == contents(tmp_path / "fresh")


@pytest.mark.parametrize("shorter", [True, False])
def test_a_repaired_file_has_other_units(tmp_path, tokenizer_folder, shorter):
    """Units behind it have other numbers then and are made again; none is left over."""
    folder, output = good_files(tmp_path / "documents"), tmp_path / "data"
    good = (folder / "b.jsonl").read_bytes()
    (folder / "b.jsonl").write_bytes(good * (3 if shorter else 1) + b"nonsense\n")
    before = begun(folder, tokenizer_folder, output, "b.jsonl line .*invalid JSON", unit_bytes=500)
    (folder / "b.jsonl").write_bytes(good * (1 if shorter else 3))
    build_here([folder], tokenizer_folder, output, unit_bytes=500)
    first = [unit for unit in before if unit < "unit-00003"]
    assert {unit: units_of(output)[unit] for unit in first} == {unit: before[unit] for unit in first}
    build_here([folder], tokenizer_folder, tmp_path / "fresh", unit_bytes=500)
    assert contents(output) == contents(tmp_path / "fresh")


def test_what_changed_without_its_size_is_made_again(tmp_path, tokenizer_folder):
    folder, output = good_files(tmp_path / "documents"), tmp_path / "data"
    (folder / "d.jsonl").write_text("nonsense\n")
    begun(folder, tokenizer_folder, output, "d.jsonl line 1: invalid JSON")
    (folder / "d.jsonl").write_text('{"text": "repaired"}\n')
    (folder / "a.jsonl").write_text((folder / "a.jsonl").read_text().replace("text 7 ", "TEXT 7 "))
    os.utime(folder / "a.jsonl", ns=(1, 1))
    build_here([folder], tokenizer_folder, output)
    build_here([folder], tokenizer_folder, tmp_path / "fresh")
    assert contents(output) == contents(tmp_path / "fresh")


def test_restored_files_and_more_of_them_lead_on(tmp_path, tokenizer_folder):
    folder, output = good_files(tmp_path / "documents", "ab"), tmp_path / "data"
    (folder / "c.jsonl").write_text("nonsense\n")
    begun(folder, tokenizer_folder, output, "c.jsonl line 1: invalid JSON")
    before = units_of(output)
    good_files(folder, "cd")
    build_here([folder], tokenizer_folder, output)
    assert {unit: units_of(output)[unit] for unit in before} == before
    build_here([folder], tokenizer_folder, tmp_path / "fresh")
    assert contents(output) == contents(tmp_path / "fresh")


def test_run_the_command_again(tmp_path, tokenizer_folder, monkeypatch):
    """As the sentence about a file that changes during a build says."""
    folder, output = good_files(tmp_path / "documents", "ab"), tmp_path / "data"
    encode_units = building.encode_units

    def changing(work, todo, *more):
        for number, ledger in enumerate(encode_units(work, todo, *more)):
            if number == 0:
                good_files(folder, "b").joinpath("b.jsonl").write_text('{"text": "another"}\n')
            yield ledger

    with monkeypatch.context() as patched:
        patched.setattr(building, "encode_units", changing)
        begun(
            folder,
            tokenizer_folder,
            output,
            "b.jsonl changed while the data set was being built: run the command again",
        )
    build_here([folder], tokenizer_folder, output)
    build_here([folder], tokenizer_folder, tmp_path / "fresh")
    assert contents(output) == contents(tmp_path / "fresh")


def test_another_field_as_the_sentence_advises(tmp_path, tokenizer_folder):
    folder, output = good_files(tmp_path / "documents", "ab"), tmp_path / "data"
    column = pa.array(["one", "two"])
    pq.write_table(pa.Table.from_arrays([column] * 3, ["text", "text", "body"]), folder / "c.parquet")
    words = ["--input", folder, "--tokenizer", tokenizer_folder, "--output", output, "--seq-length", 128]
    sentence = failure(run("build", *words, "--workers", 2, "--encoder", "plain"))
    assert "rename all but one, or choose another (--text-field)" in sentence
    assert units_of(output)
    build_here([folder], tokenizer_folder, output, text_field="body")
    build_here([folder], tokenizer_folder, tmp_path / "fresh", text_field="body")
    assert contents(output) == contents(tmp_path / "fresh")


def test_what_may_be_a_mistake_loses_nothing(tmp_path, tokenizer_folder):
    """Other files, another name of a source, other options: refused, after a failure, too; and after a plain interruption other
    fields.
    """
    folder, output = good_files(tmp_path / "documents", "ab"), tmp_path / "data"
    (folder / "c.jsonl").write_text("nonsense\n")
    before = begun(folder, tokenizer_folder, output, "c.jsonl line 1: invalid JSON")
    other = good_files(tmp_path / "other", "abc")  # the same names
    for place, options in ((other, {}), (folder, {"seed": 1}), (folder, {"text_field": "body", "seed": 1})):
        with pytest.raises(ValueError, match="was begun with another plan"):
            build_here([place], tokenizer_folder, output, **options)
    (folder / "c.jsonl").write_text('{"text": "x"}\n')
    build_here([folder], tokenizer_folder, output)
    (output / "manifest.json").unlink()  # as if the build had been interrupted
    with pytest.raises(ValueError, match="text_field is text there and body here"):
        build_here([folder], tokenizer_folder, output, text_field="body")
    assert {unit: units_of(output)[unit] for unit in before} == before
    assert not json.loads((output / "plan.json").read_text())["failed"]


@pytest.mark.parametrize("again", ["the new plan", "the old input"])
def test_an_interruption_while_the_plan_is_exchanged(tmp_path, tokenizer_folder, monkeypatch, again):
    folder, output = good_files(tmp_path / "documents"), tmp_path / "data"
    (folder / "a0.jsonl").write_text("nonsense\n")
    before = begun(folder, tokenizer_folder, output, "a0.jsonl line 1: invalid JSON")
    repaired = '{"text": "repaired"}\n'
    (folder / "a0.jsonl").write_text(repaired)
    with monkeypatch.context() as patched:

        def interrupted(*_):
            raise KeyboardInterrupt

        patched.setattr(planning, "write_plan", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_here([folder], tokenizer_folder, output)
    if again == "the old input":
        (folder / "a0.jsonl").write_text("nonsense\n")
        begun(folder, tokenizer_folder, output, "a0.jsonl line 1: invalid JSON")
        (folder / "a0.jsonl").write_text(repaired)
    build_here([folder], tokenizer_folder, output)
    if again == "the new plan":
        assert {unit: units_of(output)[unit] for unit in before} == before
    build_here([folder], tokenizer_folder, tmp_path / "fresh")
    assert contents(output) == contents(tmp_path / "fresh")


plans = st.recursive(
    st.one_of(st.none(), st.integers(), st.text(max_size=3)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["plan", "times", "units", "failed", "sources", "version"]), inner, max_size=5),
    ),
    max_leaves=12,
)


@examples(100)
@given(content=plans)
def test_any_plan_file_is_followed_or_refused(content):
    with TemporaryDirectory() as folder:
        Path(folder, "plan.json").write_text(json.dumps(content))
        Path(folder, "tokens").mkdir()
        Path(folder, "tokens", "unit-00000.json").write_text(LEDGER)
        (path := Path(folder, "a.txt")).write_text("x")
        options = planning.BuildOptions(packing=PackingPolicy(seq_length=8))
        plan = planning.PackingPlan(options, [], {"sources": {}, "version": 1}, {str(path): 1})
        with suppress(ValueError):  # nothing else
            plan.adopt(Path(folder))
