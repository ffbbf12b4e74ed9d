import gzip
import json
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from data_prep.documents import Problems, read_unit
from data_prep.sources import parse_sources, plan_units
from tests.data_prep.builds import read
from tests.data_prep.texts import awkward, write_lines
from tests.properties import examples

TEXTS = ["first", "", " \n", "zwei\r\nLinien", "三\0", "x" * 1000, "</s>", "last"]


def write_all_formats(folder, texts):
    records = [{"text": text, "id": f"n{i}"} for i, text in enumerate(texts)]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    (folder / "a.jsonl").write_bytes(lines)
    with gzip.open(folder / "b.jsonl.gz", "wb") as file:
        file.write(lines)
    half = len(lines) // 2
    (folder / "c.jsonl.zst").write_bytes(zstandard.compress(lines[:half]) + zstandard.compress(lines[half:]))
    (folder / "d.json").write_text(json.dumps(records, indent=2))
    (folder / "e.json").write_bytes(lines)
    pq.write_table(pa.Table.from_pylist(records), folder / "f.parquet", row_group_size=3)
    datasets.Dataset.from_list(records).save_to_disk(str(folder / "g"), num_shards=2)
    datasets.DatasetDict({"one": datasets.Dataset.from_list(records)}).save_to_disk(str(folder / "h"))
    return ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.json", "e.json", "f.parquet", "g", "h"]


def test_every_format_gives_the_same_documents(tmp_path):
    for name in write_all_formats(tmp_path, TEXTS):
        for unit_bytes in (None, 20):
            documents, _ = read(tmp_path / name, unit_bytes=unit_bytes, id_field="id")
            assert [d.text for d in documents] == TEXTS, name
            assert [d.key for d in documents] == [f"n{i}" for i in range(len(TEXTS))]
        documents, _ = read(tmp_path / name)
        assert len({d.key for d in documents}) == len(TEXTS)


def test_text_files_are_one_document_each(tmp_path):
    for name, content in (("b.txt", "\ufeffwith\r\nBOM"), ("a.md", "# é"), ("sub/c.txt", ""), (".hidden.txt", "no")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content.encode())
    (tmp_path / "ignored.doc").write_text("no")
    documents, _ = read(tmp_path)
    assert [(d.key, d.text) for d in documents] == [("a.md", "# é"), ("b.txt", "with\r\nBOM"), ("sub/c.txt", "")]


@examples(60)
@given(texts=st.lists(awkward, min_size=1, max_size=20), unit_bytes=st.integers(1, 400), newline=st.booleans())
def test_cutting_into_units_changes_nothing(tmp_path, texts, unit_bytes, newline):
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    (tmp_path / "a.jsonl").write_bytes((lines + "\n" * newline).encode())
    whole, _ = read(tmp_path / "a.jsonl", unit_bytes=1 << 30)
    cut, _ = read(tmp_path / "a.jsonl", unit_bytes=unit_bytes)
    assert cut == whole
    assert [d.text for d in whole] == texts


BAD_LINES = [
    (b'{"text": "caf\xe9"}', "invalid UTF-8 (byte 0xe9 in column 14)"),
    (b'{"text": "\\ud800"}', "invalid UTF-8"),
    (b'{"text": "open}', "invalid JSON"),
    (b'"just a string"', "not a JSON object"),
    (b'{"body": "x"}', "no field 'text' (it has body)"),
    (b'{"text": null}', "field 'text' is not text"),
    (b"[" * 100_000, "invalid JSON"),
]


@pytest.mark.parametrize(("line", "words"), BAD_LINES, ids=range(len(BAD_LINES)))
@pytest.mark.parametrize("unit_bytes", [None, 12])
def test_bad_records_are_named_or_skipped(tmp_path, line, words, unit_bytes):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n{"text": "two"}\n' + line + b'\n{"text": "three"}\n')
    with pytest.raises(ValueError) as caught:
        read(path, unit_bytes=unit_bytes)
    assert str(caught.value).startswith(f"{path} line 4: {words}")
    documents, problems = read(path, on_error="skip", unit_bytes=unit_bytes)
    assert [d.text for d in documents] == ["one", "two", "three"]
    assert problems.count == 1
    assert problems.examples[0].startswith(f"{path} line 4: {words}")


def test_bad_whole_files_and_rows(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\nnot \xff fine")
    (tmp_path / "b.json").write_bytes(b'[{"text": "x"},\n nonsense]')
    invalid = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
    )
    pq.write_table(pa.table({"text": invalid}), tmp_path / "c.parquet")
    for name, words in [
        ("a.txt", "line 2: invalid UTF-8"),
        ("b.json", "line 2: invalid JSON"),
        ("c.parquet", "row 1: invalid UTF-8"),
    ]:
        with pytest.raises(ValueError, match=f"{name} {words}"):
            read(tmp_path / name)
    documents, problems = read(tmp_path, on_error="skip")
    assert [d.text for d in documents] == ["x", "a"]
    assert problems.reasons == {"invalid UTF-8": 2, "invalid JSON": 1}


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_damaged_compressed_files(tmp_path, suffix):
    lines = b"".join(json.dumps({"text": os.urandom(500).hex()}).encode() + b"\n" for _ in range(300))
    data = gzip.compress(lines) if suffix.endswith("gz") else zstandard.compress(lines)
    for name, content in (("cut", data[: len(data) // 2]), ("flipped", data[:2] + b"\xff\xff" + data[4:])):
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"line \d+: damaged compressed file"):
            read(path)
        documents, problems = read(path, on_error="skip")
        assert problems.count == 1
        assert all(len(d.text) == 1000 for d in documents)


def test_ids_must_be_usable(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"text": "x", "id": 7}, {"text": "y"}])
    documents, problems = read(tmp_path / "a.jsonl", on_error="skip", id_field="id")
    assert documents == [("7", "x")]
    assert problems.examples[0].endswith("line 2: field 'id' is missing or not usable as an id")


def test_missing_columns_name_those_that_exist(tmp_path):
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"no column 'text': it has body \(see --text-field\)"):
        read(tmp_path / "a.parquet")
    documents, _ = read(tmp_path / "a.parquet", text_field="body")
    assert documents == [("a.parquet#0", "x")]


def test_a_file_is_read_once_however_often_it_is_found(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("a")
    (tmp_path / "link.txt").symlink_to(tmp_path / "real" / "a.txt")
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    documents, _ = read(tmp_path, tmp_path / "real" / "a.txt")
    assert [d.text for d in documents] == ["a"]


def test_names_are_stable_and_unique(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(folder)
    documents, _ = read(tmp_path / "y", tmp_path / "x")
    assert [(d.key, d.text) for d in documents] == [("a.txt", "x"), ("a.txt@2", "y")]
    documents, _ = read(tmp_path / "*" / "*.txt")
    assert [d.key for d in documents] == ["x/a.txt", "y/a.txt"]


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "x"}])
    units, files, _ = plan_units(parse_sources([str(path)], []))
    path.write_text('{"text": "y"}\n{"text": "z"}\n')
    with pytest.raises(ValueError, match="changed while the data set was being built"):
        list(read_unit(units[0], files, "text", None, Problems("fail")))


@pytest.mark.parametrize(
    ("inputs", "named", "words"),
    [
        ([], [], "no input"),
        ([], ["web"], "write NAME=PATH"),
        ([], ["bad name=a.txt"], "write NAME=PATH"),
        ([], ["a=x.txt:1", "b=y.txt"], "give a weight to every source or to none: b has none"),
        ([], ["a=x.txt:1", "a=y.txt:2"], "was given weight 1 before"),
        ([], ["a=x.txt:-1"], "a weight is a positive number"),
        ([], ["a=x.txt:nan"], "a weight is a positive number"),
    ],
)
def test_sources_that_make_no_sense(inputs, named, words):
    with pytest.raises(ValueError, match=words):
        parse_sources(inputs, named)


def test_sources():
    sources = parse_sources(["p"], [])
    assert [(s.name, s.weight, s.places) for s in sources] == [("documents", None, ("p",))]
    sources = parse_sources([], ["a=x:y:0.5", "b=z:2", "a=w"])
    assert [(s.name, s.weight, s.places) for s in sources] == [("a", 0.5, ("x:y", "w")), ("b", 2.0, ("z",))]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "nowhere", "there is no file or folder"),
        (lambda folder: folder, "holds no new document files"),
        (lambda folder: folder / "*.txt", "there is no file or folder"),
        (lambda folder: (folder / "a.doc", (folder / "a.doc").write_text("x"))[0], "none of the known suffixes"),
        (
            lambda folder: (folder / "a.parquet", (folder / "a.parquet").write_text("x"))[0],
            "not a readable parquet file",
        ),
    ],
)
def test_input_that_is_not_there(tmp_path, make, words):
    with pytest.raises(ValueError, match=words):
        read(make(tmp_path))


def test_a_long_line(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "word " * 1_000_000}, {"text": "after"}])
    documents, _ = read(path, unit_bytes=100_000)
    assert [len(d.text) for d in documents] == [5_000_000, 5]
