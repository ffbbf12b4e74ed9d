"""Exported files hold the documents and rows of the data set, as the programs that they are for read them."""

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import types
from itertools import chain, pairwise

import duckdb
import numpy as np
import polars
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import export_files
from data_prep.export import export
from data_prep.export_files import (
    FORMATS,
    Entry,
    FilePart,
    export_problems,
    write_mds,
    write_mds_index,
    write_megatron,
    write_parquet,
)
from data_prep.store import TokenStore
from storage.manifest import read_manifest
from storage.shards import open_split
from tests.data_prep.builds import ROOT, failure, run
from tests.processes import clean_environment


def module_of(name: str) -> types.ModuleType:
    """A module of a package of requirements-readers.txt without what the packages around it import: seconds, and torchvision."""
    parents = [".".join(name.split(".")[:depth]) for depth in range(1, name.count(".") + 1)]
    for parent in parents:
        if parent in sys.modules:
            continue
        spec = importlib.util.find_spec(parent)
        if spec is None:
            pytest.skip(f"needs {parent} (requirements-readers.txt)")
        package = types.ModuleType(parent)
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules[parent] = package
    return importlib.import_module(name)


@pytest.fixture(scope="module")
def megatron():
    module_of("megatron.core.parallel_state")  # which it needs first
    IndexedDataset = module_of("megatron.core.datasets.indexed_dataset").IndexedDataset
    return lambda prefix: IndexedDataset(str(prefix), mmap=True)


@pytest.fixture(scope="module")
def mds():
    LocalDataset = module_of("streaming.base.local").LocalDataset
    return lambda folder: LocalDataset(str(folder))


def documents_of(data, split):
    """Tokens, number and key of each document of a split."""
    documents = TokenStore.open(data / "tokens").documents(split)
    return [(documents.tokens(i), int(documents.doc[i]), documents.key(i)) for i in range(len(documents))]


def rows_of(data, split):
    dataset = open_split(data, split)
    return [dataset.row("documents", i) for i in range(len(dataset))]


def test_megatron_reads_documents_and_the_pieces_of_rows(reference, tmp_path, megatron):
    export(reference, "megatron", tmp_path / "documents")
    export(reference, "megatron", tmp_path / "rows", of="rows")
    for split in ("train", "validation"):
        found, expected = megatron(tmp_path / "documents" / f"{split}-documents"), documents_of(reference, split)
        assert len(found) == len(expected) > 0
        assert found[0].dtype == np.uint16
        np.testing.assert_array_equal(found.document_indices, np.arange(len(expected) + 1))
        for tokens, (ids, *_) in zip(found, expected, strict=True):
            np.testing.assert_array_equal(tokens, ids)
        found, rows = megatron(tmp_path / "rows" / f"{split}-documents"), rows_of(reference, split)
        assert len(found.document_indices) == len(rows) + 1
        for row, (first, last) in zip(rows, pairwise(found.document_indices), strict=True):
            pieces = [found[i] for i in range(first, last)]
            assert [len(piece) for piece in pieces] == row.seg_len.tolist()
            np.testing.assert_array_equal(np.concatenate(pieces), row.ids[: row.seg_len.sum()])


def test_streaming_reads_documents_and_rows(reference, chat_data, tmp_path, mds, monkeypatch):
    monkeypatch.setitem(FORMATS, "mds", FORMATS["mds"]._replace(part_bytes=100_000))
    export(reference, "mds", tmp_path / "documents")
    export(chat_data, "mds", tmp_path / "rows", of="rows")
    assert len(list((tmp_path / "documents/train/documents").glob("shard.*.mds"))) > 2
    for split in ("train", "validation"):
        found = mds(tmp_path / "documents" / split / "documents")
        assert len(found) == len(documents_of(reference, split))
        for sample, (ids, number, key) in zip(found, documents_of(reference, split), strict=True):
            assert (sample["document"], sample["key"], sample["source"]) == (number, key, "documents")
            np.testing.assert_array_equal(sample["tokens"], ids)
        found, dataset = mds(tmp_path / "rows" / split / "documents"), open_split(chat_data, split)
        assert len(found) == len(dataset) > 1
        for i, (sample, row) in enumerate(zip(found, rows_of(chat_data, split), strict=True)):
            np.testing.assert_array_equal(sample["tokens"], row.ids)
            np.testing.assert_array_equal(sample["target_spans"], dataset.spans("documents", i))
            for name in row._fields[1:]:
                np.testing.assert_array_equal(sample[name], getattr(row, name))


def test_duckdb_and_polars_read_documents_and_rows(reference, chat_data, tmp_path, monkeypatch):
    monkeypatch.setitem(FORMATS, "parquet", FORMATS["parquet"]._replace(part_bytes=100_000))
    monkeypatch.setattr(export_files, "PARQUET_BATCH_BYTES", 30_000)
    export(reference, "parquet", tmp_path / "rows", of="rows")
    export(chat_data, "parquet", tmp_path / "documents")
    for split in ("train", "validation"):
        place = f"{tmp_path}/rows/{split}/*.parquet"
        table, rows = polars.read_parquet(place).sort("row"), rows_of(reference, split)
        assert table["row"].to_list() == list(range(len(rows)))
        asked = duckdb.sql(
            f"select input_ids, seg_len, seg_ctx, seg_doc, seg_off from '{place}' order by row"
        ).fetchall()
        columns = ["input_ids", *rows[0]._fields[1:]]
        for row, a, b in zip(rows, asked, table.select(columns).rows(), strict=True):
            assert list(a) == list(b) == [column.tolist() for column in row]
        place = f"{tmp_path}/documents/{split}/*.parquet"
        store, expected = TokenStore.open(chat_data / "tokens"), documents_of(chat_data, split)
        table = polars.read_parquet(place).sort("document")
        assert duckdb.sql(f"select input_ids from '{place}' order by document").fetchall() == [
            (ids.tolist(),) for ids, *_ in expected
        ]
        assert table.select("input_ids", "document", "key").rows() == [(i.tolist(), n, k) for i, n, k in expected]
        spans, _ = store.targets(np.array([number for _, number, _ in expected]))
        flat = [pair for pairs in table["target_spans"] for pair in pairs.to_list()]
        assert flat == np.stack([spans.begin, spans.end], axis=1).tolist()


entries = st.lists(
    st.tuples(
        st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9), min_size=1, max_size=4),
        st.integers(0, 3),
        st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=3),
        st.text(max_size=5).filter(str.isprintable),
    ),
    min_size=1,
    max_size=8,
)


@given(entries)
@settings(max_examples=10)
def test_any_entries_are_read_as_they_were(tmp_path_factory, megatron, mds, drawn):
    folder, part = tmp_path_factory.mktemp("any"), FilePart("train", "a", 0, 0, len(drawn))
    made = [
        Entry(
            np.array([*chain(*pieces), *[0] * padding], np.uint32),
            np.array([len(piece) for piece in pieces], np.int32),
            {"key": key, "row": 1 << 40, "target_spans": np.array(spans, np.int32).reshape(-1, 2)},
        )
        for pieces, padding, spans, key in drawn
    ]
    write_megatron(folder, part, made, "int32")
    write_mds_index(folder, "train", "a", [write_mds(folder, part, made, "int32").shard])
    (name,) = write_parquet(folder, part, made, "int32").files
    sequences, samples = megatron(folder / "train-a"), mds(folder / "train" / "a")
    assert [s.tolist() for s in sequences] == [piece for pieces, *_ in drawn for piece in pieces]
    assert np.diff(sequences.document_indices).tolist() == [len(pieces) for pieces, *_ in drawn]
    table = polars.read_parquet(folder / name).rows(named=True)
    for entry, sample, row in zip(made, samples, table, strict=True):
        assert sample["tokens"].tolist() == row["input_ids"] == entry.tokens.tolist()
        assert sample["target_spans"].tolist() == row["target_spans"] == entry.fields["target_spans"].tolist()
        assert (sample["key"], sample["row"]) == (row["key"], row["row"]) == (entry.fields["key"], 1 << 40)


KILLED = """
import os, signal, sys
from pathlib import Path
from data_prep import export_files as files, export
write, calls = files.write_mds, []
def kill(*arguments):
    calls.append(1)
    if len(calls) == 3:
        (Path(arguments[0]) / "train/documents/shard.00002.mds.tmp").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*arguments)
files.FORMATS["mds"] = files.Format(kill, 100_000, True)
export.export(Path(sys.argv[1]), "mds", Path(sys.argv[2]))
"""


def test_a_killed_export_is_not_there_and_continues_with_the_same_bytes(reference, tmp_path, monkeypatch):
    words = [sys.executable, "-c", KILLED, reference, tmp_path / "killed"]
    done = subprocess.run(words, cwd=ROOT, env=clean_environment(), timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    written = []

    def write(root, part, *rest):
        written.append(part.number)
        return write_mds(root, part, *rest)

    monkeypatch.setitem(FORMATS, "mds", FORMATS["mds"]._replace(part_bytes=100_000, write=write))
    export(reference, "mds", tmp_path / "killed")
    assert written[0] == 2
    export(reference, "mds", tmp_path / "whole")
    files = {path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    assert files == {
        path.relative_to(tmp_path / "killed") for path in (tmp_path / "killed").rglob("*") if path.is_file()
    }
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "killed" / file).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed", "whole"]


def test_what_cannot_be_exported_is_refused(reference, chat_data, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(reference, data)
    with pytest.raises(ValueError, match=r"only a part carries loss, and a \.bin cannot say which: use --format mds"):
        export(chat_data, "megatron", out)
    export(data, "parquet", out)
    assert export(data, "parquet", out)["fingerprint"] == read_manifest(data).fingerprint  # again: it is complete
    with pytest.raises(ValueError, match="is an export of something else"):
        export(data, "parquet", out, of="rows")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(ValueError, match="full is there already: choose another --output"):
        export(data, "parquet", tmp_path / "full")
    (shard,) = (data / "validation").glob("shard-*")
    held = bytearray(shard.read_bytes())
    held[len(held) // 2] ^= 1
    shard.write_bytes(held)
    with pytest.raises(ValueError, match="has changed: its sha256"):
        export(data, "parquet", tmp_path / "new", of="rows")
    shutil.rmtree(data / "tokens")
    with pytest.raises(ValueError, match="tokens is gone, so documents cannot be exported"):
        export(data, "parquet", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_verify_finds_what_changed_in_an_export(reference, tmp_path):
    out = tmp_path / "out"
    done = run("export", reference, "--format", "megatron", "-o", out)
    assert done.returncode == 0, done.stderr
    assert "train       documents: " in done.stdout
    exported = json.loads((out / "export.json").read_text())
    assert {facts["file"] for facts in exported["files"]} == {
        str(path.relative_to(out)) for path in out.rglob("*") if path.is_file() and path.name != "export.json"
    }
    path = out / "train-documents.bin"
    assert {problem for _, problem in export_problems(out, full=True)} == {None}
    path.write_bytes(b"x" + path.read_bytes()[1:])
    assert "train-documents.bin has changed" in failure(run("verify", out, "--full"))
    path.write_bytes(b"")
    assert any("train-documents.bin has 0 bytes" in problem for _, problem in export_problems(out) if problem)
    path.unlink()
    assert any("train-documents.bin is missing" in problem for _, problem in export_problems(out) if problem)
