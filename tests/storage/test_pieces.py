"""A row's pieces are the same from their file as from the shards, and from the shards where the file is not of them."""

import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from storage import pieces
from storage.documents import index_documents, index_problems, is_indexed
from storage.mapped import LOOK_SECONDS
from storage.pieces import PieceFile
from storage.shards import ShardedDataset, open_split
from tests.model.tiny import tiny
from tests.training.corpus import build
from training.balance import row_costs

LENGTHS = {"books": [9] * 40, "many": [5] * 5000, "web": list(range(1, 60))}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("pristine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECES", 40)  # batches of one block: 1,024 rows
        build(directory, LENGTHS, seq_length=16, rows_per_shard=1024, overlap=2)
    return directory


@pytest.fixture
def dataset(pristine, tmp_path) -> ShardedDataset:
    return open_split(Path(shutil.copytree(pristine, tmp_path / "data")), "train")


def all_pieces(dataset: ShardedDataset) -> list[list[tuple]]:
    found = []
    for number, (_, rows) in enumerate(dataset.rows_per_source.items()):
        columns = (dataset.pieces(number, row) for row in range(rows))
        found.append([(each.seg_len.tolist(), each.seg_doc.tolist()) for each in columns])
    return found


def by_reading(dataset: ShardedDataset) -> list[list[tuple]]:
    places = [[dataset.row(source, row) for row in range(rows)] for source, rows in dataset.rows_per_source.items()]
    return [[(row.seg_len.tolist(), row.seg_doc.tolist()) for row in rows] for rows in places]


def opened(dataset: ShardedDataset) -> bool:
    return any(shard for shards in dataset._mapped for shard in shards)


def test_with_a_file_no_shard_is_opened_and_without_one_the_answers_are_the_same(dataset):
    expected, visibility = by_reading(open_split(dataset.directory, "train")), tiny().visibility
    assert len(expected[1]) > 1024, "more than a batch"
    assert all_pieces(dataset) == all_pieces(pickle.loads(pickle.dumps(dataset))) == expected
    rng = np.random.default_rng(0)
    sources = rng.integers(0, 3, 200)
    rows = rng.integers(0, np.array(list(dataset.rows_per_source.values()))[sources])
    costs = row_costs(dataset, sources, rows, visibility)
    assert not opened(dataset)
    for path in dataset.directory.glob("train/pieces-*"):
        path.unlink()  # while it is open
    time.sleep(LOOK_SECONDS)
    assert all_pieces(dataset) == expected
    without = open_split(dataset.directory, "train")
    np.testing.assert_array_equal(row_costs(without, sources, rows, visibility), costs)
    assert opened(dataset)
    assert opened(without)
    assert not is_indexed(without, "many")
    for source in without.sources:
        index_documents(without, source)
        assert is_indexed(without, source)
    anew = open_split(dataset.directory, "train")
    assert all_pieces(anew) == expected
    assert not opened(anew)


def test_a_file_of_other_shards_a_cut_one_and_a_wrong_one(dataset):
    expected = by_reading(dataset)
    many, web = (dataset.piece_path(source) for source in ("many", "web"))
    assert [*index_problems(dataset, "many", full=True), *index_problems(dataset, "web", full=True)] == []
    whole, entry = many.read_bytes(), dataset.manifest.splits["train"]["many"]
    for size in range(0, len(whole) - 16, len(whole) // 50):
        many.write_bytes(whole[:size])
        assert PieceFile.open(many, entry.shards_hash, entry.rows) is None
    assert all_pieces(open_split(dataset.directory, "train")) == expected
    shutil.copy(many, web)
    web.write_bytes(whole)
    assert all_pieces(open_split(dataset.directory, "train")) == expected
    for path, source in ((many, "many"), (web, "web")):
        (problem,) = index_problems(dataset, source, full=False)
        assert problem.startswith(f"{path} is damaged or of other shards: remove it")
    value = np.concatenate([documents for _, documents in expected[1][:9]]).tobytes()
    assert value in whole
    many.write_bytes(whole.replace(value, value[8:] + value[:8]))
    assert list(index_problems(dataset, "many", full=False)) == []
    (problem,) = index_problems(dataset, "many", full=True)
    assert problem.startswith(f"{many} does not say which documents rows hold: remove it")
