"""Values are found by their keys as if all pairs were read, and rows by their documents."""

import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage import lookup
from storage.documents import index_documents, index_problems, is_indexed, pieces_of, rows_of
from storage.lookup import Lookup, write_lookup
from storage.shards import ShardedDataset, open_split
from tests.properties import examples
from tests.training.corpus import build

LENGTHS = {"books": [9] * 400 + [5] * 90 + [400] * 5, "web": list(range(1, 60))}


@examples(60)
@given(
    pieces=st.lists(st.lists(st.tuples(st.sampled_from([0, 1, 7, 2**63, 2**64 - 1]), st.integers(0, 9)), max_size=9)),
    run=st.integers(1, 20),
)
def test_values_of_a_key(tmp_path_factory, pieces, run):
    file = tmp_path_factory.mktemp("lookup") / "index"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookup, "RUN", run)
        columns = [
            (np.array([k for k, _ in piece], np.uint64), np.array([v for _, v in piece], np.int64)) for piece in pieces
        ]
        write_lookup(file, "these", columns)
    found = Lookup.open(file, "these")
    given = [pair for piece in pieces for pair in piece]
    assert [len(keys) for keys, _ in found.runs[:-1]] == [run] * (len(found.runs) - 1)
    for key in {key for key, _ in given} | {5}:
        assert found.find(key) == [value for k, value in given if k == key]
    assert Lookup.open(file, "others") is None
    for size in range(0, file.stat().st_size, 97):
        file.with_name("cut").write_bytes(file.read_bytes()[:size])
        cut = Lookup.open(file.with_name("cut"), "these")
        assert cut is None or cut.find(0) == found.find(0)  # the stream's end mark follows the last run


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("pristine")
    build(directory, LENGTHS, seq_length=16, rows_per_shard=1024, overlap=2)
    return directory


@pytest.fixture
def dataset(pristine, tmp_path) -> ShardedDataset:
    return open_split(Path(shutil.copytree(pristine, tmp_path / "data")), "train")


def by_reading(dataset: ShardedDataset, document: int) -> list[tuple]:
    found = []
    for source, rows in dataset.rows_per_source.items():
        for number in range(rows):
            row = dataset.row(source, number)
            pieces = zip(row.seg_doc.tolist(), row.seg_off.tolist(), row.seg_len.tolist(), strict=True)
            found += [(source, number, offset, length) for d, offset, length in pieces if d == document]
    return sorted(found, key=lambda piece: piece[2])


def test_rows_of_a_document_with_an_index_without_and_anew(dataset):
    for document in (0, 7, 492, 495, 520, 10_000):
        expected = by_reading(dataset, document)
        for how in ("built", "none", "anew"):
            for source in dataset.sources:
                file = dataset.directory / f"train/documents-{source}.arrow"
                if how == "none":
                    file.unlink()
                elif how == "anew":
                    index_documents(dataset, source)
                assert is_indexed(dataset, source) == (how != "none")
            found = [(s, *piece) for s in dataset.sources for piece in pieces_of(dataset, s, document)]
            assert found == expected
            assert {(s, row) for s in dataset.sources for row in rows_of(dataset, s, document)} == {
                (source, row) for source, row, *_ in expected
            }


def test_an_index_of_other_shards_is_none_and_a_wrong_one_is_noticed(dataset):
    def problems(source: str, full: bool) -> list[str]:
        return list(index_problems(dataset, source, full))

    books, web = (dataset.directory / f"train/documents-{source}.arrow" for source in ("books", "web"))
    assert problems("books", full=True) == []
    whole = books.read_bytes()
    shutil.copy(web, books)
    assert not is_indexed(dataset, "books")
    assert rows_of(dataset, "books", 3) == sorted({row for _, row, *_ in by_reading(dataset, 3)})
    assert problems("books", full=False)[0].startswith(f"{books} is damaged or of other shards: remove it")
    value = np.concatenate([rows_of(dataset, "web", document) for document in range(495, 554)]).tobytes()
    web.write_bytes(web.read_bytes().replace(value, value[8:] + value[:8]))
    assert problems("web", full=False) == []
    assert problems("web", full=True)[0].startswith(f"{web} does not say which rows hold which documents")
    books.write_bytes(whole)
    assert problems("books", full=True) == []


def test_an_index_of_many_runs_is_compared_run_by_run(dataset, monkeypatch):
    """One run too many, too few, or another: noticed; and what is held does not grow with the runs."""
    monkeypatch.setattr(lookup, "RUN", 1 << 14)
    generator = np.random.default_rng(0)
    pieces = [(generator.integers(0, 1 << 40, 5000).astype(np.uint64), np.arange(5000)) for _ in range(128)]
    file = dataset.directory / "train/documents-books.arrow"
    write_lookup(file, dataset.manifest.splits["train"]["books"].shards_hash, pieces)
    other = [*pieces[:-1], (pieces[-1][0], pieces[-1][1] + 1)]
    for rows, problems in ((pieces, 0), (pieces[:-10], 1), (pieces + pieces[:10], 1), (other, 1)):
        monkeypatch.setattr("storage.documents._pairs", lambda *_, rows=rows: iter(rows))
        tracemalloc.start()
        assert len(list(index_problems(dataset, "books", full=True))) == problems
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 5 * 16 * lookup.RUN  # a run and its sorting; there are 40
