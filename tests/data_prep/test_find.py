"""Folders and files that cannot be looked at, and names that UTF-8 cannot hold: an error, or under skip named."""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pytest

from data_prep.verify import problems as problems_of
from storage.manifest import read_manifest
from tests.data_prep.builds import build_here, failure, left_out_of, read, run, unprivileged
from tests.data_prep.test_formats import as_arrow
from tests.data_prep.texts import write_lines

CLOSED = "a folder that cannot be opened (what it holds cannot be counted)"


@pytest.fixture
def folder():
    """A folder that anybody can reach; `tmp_path` is its owner's alone."""
    with TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        write_lines(Path(place, "a.jsonl"), [{"text": "one"}, {"text": "two"}])
        (Path(place) / "sub").mkdir()
        write_lines(Path(place, "sub", "b.jsonl"), [{"text": "three"}])
        yield Path(place)
        for path in Path(place).rglob("*"):
            path.chmod(0o755)


def closed(folder: Path) -> list[tuple[str, str, int, int]]:
    with unprivileged():
        return [(Path(e.path).name, e.reason, e.size, e.files) for e in left_out_of(folder, on_error="skip")]


@pytest.mark.parametrize("mode", [0o000, 0o111, 0o444])  # nothing; not to be listed; its files not to be reached
def test_a_folder_within_that_cannot_be_opened(folder, mode):
    (folder / "sub").chmod(mode)
    named = folder / "sub" / "b.jsonl" if mode == 0o444 else folder / "sub"
    with (
        unprivileged(),
        pytest.raises(ValueError, match=f"{named} cannot be opened: Permission denied; --on-error skip"),
    ):
        read(folder)
    with unprivileged():
        documents, problems = read(folder, on_error="skip")
    assert [document.text for document in documents] == ["one", "two"]
    assert problems.count == 0
    assert closed(folder) == [("b.jsonl", "cannot be opened", 0, 1) if mode == 0o444 else ("sub", CLOSED, 0, 1)]
    if mode != 0o444:
        with unprivileged(), pytest.raises(ValueError, match=r"sub cannot be opened: Permission denied$"):
            read(folder / "sub", on_error="skip")  # named itself, it must be readable


def test_a_file_and_a_hidden_folder_that_cannot_be_opened(folder):
    (folder / "sub" / "b.jsonl").chmod(0)
    (folder / ".git" / "objects").mkdir(parents=True)
    (folder / ".git" / "head").write_text("12345")
    (folder / ".git" / "objects").chmod(0)
    with (
        unprivileged(),
        pytest.raises(ValueError, match=r"b.jsonl: cannot be opened .Permission denied.; --on-error skip"),
    ):
        read(folder)
    with unprivileged():
        documents, problems = read(folder, on_error="skip")
    assert [document.text for document in documents] == ["one", "two"]
    assert [(Path(entry.path).name, entry.reason) for entry in problems.left_out] == [("b.jsonl", "cannot be opened")]
    assert closed(folder) == [(".git", "hidden (not all of it can be opened and counted)", 5, 2)]


def test_it_is_in_the_manifest(folder, tokenizer_folder):
    (folder / "out").mkdir()
    (folder / "out").chmod(0o777)
    (folder / "tokenizer.model").write_bytes((tokenizer_folder / "tokenizer.model").read_bytes())
    build_here(
        [folder], folder / "tokenizer.model", folder / "out" / "open"
    )  # the interpreter's own files may be closed
    (folder / "sub").chmod(0)
    with unprivileged():
        build_here([folder], folder / "tokenizer.model", folder / "out" / "data", on_error="skip")
        entry = read_manifest(folder / "out" / "data").left_out[CLOSED]
        assert (entry.files, entry.bytes, entry.names) == (1, 0, [str(folder / "sub")])
        with pytest.raises(ValueError, match="sub cannot be opened"):
            build_here([folder], folder / "tokenizer.model", folder / "out" / "data")


STATES = {
    "nothing": "{}",
    "no JSON": "[",
    "deep": "[" * 100_000,
    "a number": '{"_data_files": [{"filename": 5}]}',
    "missing": json.dumps({"_data_files": [{"filename": "b.arrow"}, {"filename": "x.arrow"}]}),
    "surrogate": json.dumps({"_data_files": [{"filename": "b.arrow"}, {"filename": "\ud800.arrow"}]}),
}


@pytest.mark.parametrize("state", STATES)
def test_a_saved_datasets_folder_whose_list_is_wrong(folder, state):
    saved = folder / "saved"
    saved.mkdir()
    (saved / "state.json").write_text(STATES[state])
    (saved / "dataset_info.json").write_text("{}")
    (saved / "b.arrow").write_bytes(as_arrow(["three"]))
    lists = state in ("missing", "surrogate")
    words = "lists .*, which is not there: restore it" if lists else "does not describe a saved `datasets` folder"
    with pytest.raises(ValueError, match=f"state.json {words}.*; --on-error skip"):
        read(saved)
    size = sum(path.stat().st_size for path in saved.iterdir())
    documents, problems = read(folder, on_error="skip")
    assert [document.text for document in documents][2:] == ["three"] * (1 + lists)
    assert problems.count == 0
    named = {(entry.path, entry.reason): (entry.files, entry.size) for entry in left_out_of(folder, on_error="skip")}
    if lists:
        gone = "x.arrow" if state == "missing" else r"\ud800.arrow"
        assert named[f"{saved}/{gone}", "listed in state.json, not there"] == (1, 0)
    else:
        assert named == {(str(saved), "a saved `datasets` folder whose state.json is damaged"): (3, size)}


# --- names ------------------------------------------------------------------------------------------------------------

LONE = ["\ud800", "a\udfffb", "\udc80"]


@pytest.mark.parametrize("lone", LONE, ids=ascii)
def test_lone_surrogates_in_keys(folder, lone, tokenizer_folder):
    """Half a pair, which JSON can spell: as an id, as the name of a field, within the text."""
    records = [{"text": "x", "id": lone}, {"text": "y", "id": "k", lone: 1}, {lone: "z"}, {"text": lone, "id": "l"}]
    path = folder / "c.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    for kind in ("lines", "list"):
        documents, problems = read(path, on_error="skip", id_field="id")
        assert documents == [("k", "y")]
        assert dict(problems.reasons) == {
            "field 'id' is missing or not usable as an id": 1,
            "no field 'text'": 1,
            "invalid UTF-8": 1,
        }
        assert "\n".join(problems.examples).isascii()
        if kind == "lines":
            path = folder / "c.json"
            path.write_text(json.dumps(records))
    build_here(
        [folder / "c.json"], tokenizer_folder, folder / "data", on_error="skip", id_field="id", validation_fraction=0
    )
    given = read_manifest(folder / "data").statistics["input"]
    assert given["documents"] == 1
    assert sum(given["skipped"].values()) == 3


def test_names_that_are_no_text(folder, tokenizer_folder):
    """Files and folders under names that are not UTF-8, two that read alike, too; an output cannot have one."""
    odd = os.fsdecode(b"\xff")
    for place in (
        folder / f"{odd}.jsonl",
        folder / r"\udcff.jsonl",
        folder / odd / f"{odd}.txt",
        folder / odd / "d.arrow",
    ):
        place.parent.mkdir(exist_ok=True)
        content = as_arrow(["x"]) if place.suffix == ".arrow" else b'{"text": "x"}\n'
        place.write_bytes(content)
    (folder / f"{odd}.doc").write_text("not read")
    documents, _ = read(folder)
    keys = [document.key for document in documents]
    assert len({*keys}) == len(keys) == 7
    assert all(key.isascii() for key in keys)
    assert [entry.path for entry in left_out_of(folder)] == [str(folder / f"{odd}.doc")]
    tokenizer, output = folder / f"{odd}.tok", folder / "data"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.model").write_bytes((tokenizer_folder / "tokenizer.model").read_bytes())
    words = ["--input", folder / odd, "--tokenizer", tokenizer, "--output", output, "--seq-length", 16, "--workers", 2]
    done = run("build", *words, "--unit-bytes", 1)
    assert done.returncode == 0, done.stderr
    assert not any(problem for _, problem in problems_of(output, full=True))
    done = run("inspect", output, "--document", r"\udcff.txt")
    assert done.returncode == 0, done.stderr
    with pytest.raises(ValueError, match=r"data: a name that is not UTF-8 cannot be used; choose another --output"):
        build_here([folder], tokenizer, folder / f"{odd}.data")
    assert "--text-field" in failure(run("build", *words[:5], folder / "other", *words[6:], "--text-field", odd))


def test_names_that_look_like_markup(folder, tokenizer_folder):
    """On a terminal, too, they are shown as they are."""
    odd = "[red]:smile:"
    (folder / "x[").mkdir()
    (folder / "x[" / f"b]{odd}.doc").write_text("not read")
    (folder / f"{odd}.jsonl").write_text('{"[/b]": 1}\n')
    words = ["--input", folder, "--tokenizer", tokenizer_folder, "--seq-length", 16, "--on-error", "skip"]
    for terminal in ({"FORCE_COLOR": "1", "COLUMNS": "300"}, {}):
        output = folder / f"{odd}{len(terminal)}"
        done = run("build", *words, "--output", output, **terminal)
        shown = run("inspect", output, **terminal)
        assert (done.returncode, shown.returncode) == (0, 0), done.stderr + shown.stderr
        for text in (done.stdout, done.stderr, shown.stdout):
            assert f"{folder}/x[/b]{odd}.doc" in text
        assert "no field 'text' (it has [/b])" in done.stdout
        assert str(output) in done.stdout
        assert str(output) in shown.stdout


def test_columns_whose_names_are_no_text(folder):
    path = folder / "c.csv"
    path.write_bytes(b"\xff,text\n1,x\n")
    assert [document.text for document in read(path)[0]] == ["x"]
    with pytest.raises(ValueError, match=r"no column 'body': it has \\udcff, text"):
        read(path, text_field="body")
    with pa.ipc.new_stream(folder / "d.arrow", pa.schema([("text", pa.string())])):
        pass
    assert read(folder / "d.arrow")[0] == []
