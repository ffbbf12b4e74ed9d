"""Tables with odd columns and damaged ones: read, or refused in a sentence with the file and the column."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data_prep.builds import left_out_of, read
from tests.properties import examples

TEXTS = ["one", "zwei\n", "", "四", "one"]


def write_table(path: Path, table: pa.Table) -> None:
    if path.suffix == ".parquet":
        return pq.write_table(table, path, row_group_size=2)
    new = pa.ipc.new_stream if path.suffix == ".arrow" else pa.ipc.new_file
    with new(path, table.schema) as writer:
        return writer.write_table(table, max_chunksize=2)


def texts_of(documents) -> list[str]:
    return [document.text for document in documents]


READABLE = {
    "string": pa.array(TEXTS),
    "large": pa.array(TEXTS, pa.large_string()),
    "view": pa.array(TEXTS, pa.string_view()),
    "dictionary": pa.array(TEXTS).dictionary_encode(),
    "large dictionary": pa.array(TEXTS, pa.large_string()).dictionary_encode(),
    "bytes": pa.array([text.encode() for text in TEXTS]),
    "large bytes": pa.array([text.encode() for text in TEXTS], pa.large_binary()),
}
REFUSED = {
    "list<": pa.array([[text] for text in TEXTS]),
    "struct<": pa.array([{"text": text} for text in TEXTS]),
    "map<": pa.array([[("text", text)] for text in TEXTS], pa.map_(pa.string(), pa.string())),
    "int64": pa.array(range(5)),
    "null": pa.nulls(5),
}


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_types_of_columns(tmp_path, suffix):
    path, ids = tmp_path / f"a{suffix}", pa.array(range(10, 15), pa.uint16())
    for name, column in READABLE.items():
        if suffix == ".parquet" and name == "view":
            continue  # Parquet has no such type
        write_table(path, pa.table({"id": ids, "text": column}))
        documents, _ = read(path, id_field="id", unit_bytes=1)
        assert texts_of(documents) == TEXTS, name
        assert [document.key for document in documents] == ["10", "11", "12", "13", "14"]
    for kind, column in REFUSED.items():
        if suffix == ".parquet" and kind == "null":
            kind = "null"
        write_table(path, pa.table({"text": column, "ids": column}))
        with pytest.raises(
            ValueError, match=rf"a{suffix}: column 'text' holds {kind}.*, not text \(see --text-field\)"
        ):
            read(path)
        documents, problems = read(path, on_error="skip", unit_bytes=1)
        assert (documents, problems.count) == ([], 1)  # said once, not for each unit
        assert [(entry.path, entry.size) for entry in problems.left_out] == [(str(path), path.stat().st_size)]
    write_table(path, pa.table({"text": TEXTS, "id": [0.5] * 5}))
    with pytest.raises(ValueError, match=r"column 'id' holds double, not text \(see --id-field\)"):
        read(path, id_field="id")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_names_of_columns(tmp_path, suffix):
    path, column = tmp_path / f"a{suffix}", pa.array(TEXTS)
    write_table(path, pa.Table.from_arrays([column] * 4, ["x", "text", "x", "text.more"]))
    assert texts_of(read(path)[0]) == TEXTS
    write_table(path, pa.Table.from_arrays([column] * 3, ["text", "text", "body"]))
    with pytest.raises(ValueError, match="2 columns are called 'text': rename all but one"):
        read(path)
    assert texts_of(read(path, text_field="body")[0]) == TEXTS
    write_table(path, pa.table({"text": TEXTS, "qzqz": TEXTS}))
    path.write_bytes(path.read_bytes().replace(b"qzqz", b"\xdczqz"))
    with pytest.raises(
        ValueError, match=rf"a{suffix}: not a readable {'parquet' if suffix == '.parquet' else 'arrow'}"
    ):
        read(path)
    assert [entry.size for entry in read(path, on_error="skip")[1].left_out] == [path.stat().st_size]


CSV = [
    (b"id,body\n1,x\n", r"a.csv line 1: no column 'text': it has id, body \(see --text-field\)", []),
    (b"text,text\n1,x\n", "a.csv line 1: 2 columns are called 'text'", []),
    (b'text,n\n"a\nb",1\nc\nd,2\n', r"a.csv line 4: wrong number of fields \(1, the header has 2\)", ["a\nb", "d"]),
    (b'text,n\na,1\n"open,2\nc,3\n', "a.csv line 3: invalid CSV", ["a"]),
    (b'text,n\na,1\n"x"y,2\nc,3\n', "a.csv line 3: invalid CSV", ["a", "c"]),
    (b"text,n\na,1\n\xff,2\nc,3\n", "a.csv line 3: invalid UTF-8", ["a", "c"]),
]


@pytest.mark.parametrize(("data", "words", "kept"), CSV, ids=range(len(CSV)))
def test_separated_values(tmp_path, data, words, kept):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbf" + data)
    with pytest.raises(ValueError, match=words):
        read(path)
    documents, problems = read(path, on_error="skip")
    assert (texts_of(documents), problems.count) == (kept, 1)
    if not kept:
        assert [entry.size for entry in problems.left_out] == [path.stat().st_size]


def test_one_file_of_a_folder_has_no_text(tmp_path):
    """As lines without the field: an error, or left out and named."""
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"body": "y"}\n')
    (tmp_path / "b.csv").write_text("id,body\n1,y\n2,z\n")
    write_table(tmp_path / "c.parquet", pa.table({"body": ["y"]}))
    documents, problems = read(tmp_path, on_error="skip")
    assert texts_of(documents) == ["x"]
    assert [Path(entry.path).name for entry in problems.left_out] == ["b.csv", "c.parquet"]
    assert problems.count == 3
    assert left_out_of(tmp_path) == []


def test_of_a_damaged_list_what_stands_before_is_kept(tmp_path):
    path, good = tmp_path / "a.json", [{"text": text} for text in TEXTS]
    for number, end in enumerate((b"", b"\n nonsense]", b', {"text": "\xff"}]', b', {"text": "open', b"] more")):
        path.write_bytes(json.dumps(good).removesuffix("]").encode() + end)
        with pytest.raises(ValueError, match=r"a.json line [12]: invalid (JSON|UTF-8)"):
            read(path)
        documents, problems = read(path, on_error="skip")
        assert (texts_of(documents), problems.count) == (TEXTS, 1), number


@examples(100)
@given(
    st.sampled_from([".parquet", ".arrow", ".feather"]),
    st.lists(st.text("ab", min_size=5, max_size=40), min_size=2, max_size=12),
    st.integers(0, 2**16),
    st.one_of(st.none(), st.integers(0, 7)),
)
def test_a_damaged_table_gives_whole_groups_or_is_named(suffix, texts, place, bit):
    """Cut (no bit), or with one bit flipped, at any offset: never an error of another kind, never a silent loss."""
    with TemporaryDirectory() as folder:
        path = Path(folder, f"a{suffix}")
        table = pa.table({"text": texts})
        if suffix == ".parquet":
            pq.write_table(table, path, row_group_size=2, write_page_checksum=True)
        else:
            write_table(path, table)
        data = bytearray(path.read_bytes())
        offset = place % len(data)
        if bit is None:
            del data[offset:]
        else:
            data[offset] ^= 1 << bit
        path.write_bytes(data)
        documents, problems = read(path, on_error="skip")
    if len(documents) != len(texts):
        assert problems.count
        assert problems.left_out or "invalid UTF-8" in problems.reasons
        assert all(entry.path == str(path) and 0 <= entry.size <= len(data) for entry in problems.left_out)
    if bit is None and suffix != ".parquet":  # the list of a Parquet file's groups stands at its end
        found = texts_of(documents)
        assert problems.count
        assert found == texts[: len(found)]
