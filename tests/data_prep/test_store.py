import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import store
from data_prep.columns import read_columns
from data_prep.ledger import Ledger, read_ledger, unit_path, write_ledger
from data_prep.sources import hash64, key_prefix
from data_prep.store import LEFT_OUT, TokenStore, write_index
from data_prep.unit_file import DocumentBatch, write_unit
from tests.properties import examples


def batch(documents: list[list[int]], first: int, dtype) -> DocumentBatch:
    return DocumentBatch(
        np.concatenate([np.array(d, dtype) for d in documents]),
        np.array([len(d) for d in documents]),
        [f"key{first + i}" for i in range(len(documents))],
        [first + i for i in range(len(documents))],
        [hash64(f"{key_prefix(0, 'even')}key{first + i}") for i in range(len(documents))],
        [bytes([i % 250]) * 16 for i in range(first, first + len(documents))],
    )


def write_store(folder, units: list[list[list[list[int]]]], dtype=np.uint16, split=None) -> TokenStore:
    number, counts = 0, []
    for unit, batches in enumerate(units):
        made = []
        for documents in batches:
            made.append(batch(documents, number, dtype))
            number += len(documents)
        write_unit(unit_path(folder, unit), np.dtype(dtype), iter(made))
        counts.append(sum(map(len, batches)))
    columns, _ = read_columns(folder, [unit % 2 for unit in range(len(units))], ["even", "odd"], folder)
    split = np.zeros(number, np.uint8) if split is None else np.array(split)
    write_index(folder, columns, split, counts, ["even", "odd"], [key_prefix(0, "even")])
    return TokenStore.open(folder)


documents = st.lists(st.lists(st.integers(0, 65_535), min_size=1, max_size=9), min_size=1, max_size=4)


@examples(40)
@given(
    units=st.lists(st.lists(documents, max_size=3), min_size=1, max_size=5),
    dtype=st.sampled_from([np.uint16, np.uint32]),
)
def test_what_was_written_is_read(tmp_path_factory, units, dtype):
    opened = write_store(tmp_path_factory.mktemp("store"), units, dtype)
    flat = [d for batches in units for documents in batches for d in documents]
    sources = [unit % 2 for unit, batches in enumerate(units) for documents in batches for _ in documents]
    assert (len(opened), opened.dtype) == (len(flat), dtype)
    for number, ids in enumerate(flat):
        assert opened.tokens(number).tolist() == ids
        assert opened.key(number) == f"key{number}"
        assert opened.find(f"key{number}") == number
    assert opened.find("nothing") is None
    for source, name in enumerate(["even", "odd"]):
        mine = opened.documents("train", name)
        assert mine.doc.tolist() == [i for i, s in enumerate(sources) if s == source]
        assert mine.length.tolist() == [len(flat[i]) for i in mine.doc]
        assert mine.nbytes.tolist() == mine.doc.tolist()
        assert [mine.tokens(i).tolist() for i in range(len(mine))] == [flat[i] for i in mine.doc]


def test_splits_and_views(tmp_path):
    opened = write_store(tmp_path, [[[[1, 2], [3], [4]]]], split=[1, LEFT_OUT, 0])
    assert opened.documents("validation").doc.tolist() == [0]
    assert opened.documents("train").doc.tolist() == [2]
    assert [opened.split(i) for i in range(3)] == ["validation", None, "train"]
    view = opened.tokens(0)
    assert not view.flags.owndata
    assert not view.flags.writeable
    allocated = pa.total_allocated_bytes()
    opened.tokens(1)
    assert pa.total_allocated_bytes() == allocated
    with pytest.raises(ValueError, match="there is no document 3"):
        opened.tokens(3)


def test_many_units_are_not_all_open(tmp_path):
    units = [[[[unit, unit + 1]]] for unit in range(store.OPEN_UNITS + 20)]
    opened = write_store(tmp_path, units)
    for _ in range(2):
        assert all(opened.tokens(unit).tolist() == [unit, unit + 1] for unit in range(len(units)))
    assert len(opened._open) == store.OPEN_UNITS


def test_an_error_while_writing_leaves_nothing(tmp_path):
    def batches():
        yield batch([[1]], 0, np.uint16)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_unit(unit_path(tmp_path, 0), np.dtype(np.uint16), batches())
    assert list(tmp_path.iterdir()) == []


def test_a_ledger_vouches_for_its_file(tmp_path):
    sha256, size = write_unit(unit_path(tmp_path, 3), np.dtype(np.uint16), iter([batch([[1]], 0, np.uint16)]))
    ledger = Ledger(unit=3, plan_sha256="p", input_sha256="i", sha256=sha256, file_bytes=size, documents=1)
    assert read_ledger(tmp_path, 3, "p") is None
    write_ledger(tmp_path, ledger)
    assert read_ledger(tmp_path, 3, "p") == ledger
    assert read_ledger(tmp_path, 3, "another plan") is None
    with unit_path(tmp_path, 3).open("ab") as file:
        file.write(b"x")
    assert read_ledger(tmp_path, 3, "p") is None
    unit_path(tmp_path, 3).with_suffix(".json").write_text('{"unit": 3')
    assert read_ledger(tmp_path, 3, "p") is None


def test_a_store_that_is_not_complete_is_named(tmp_path):
    with pytest.raises(ValueError, match="not a complete token store"):
        TokenStore.open(tmp_path)
    opened = write_store(tmp_path, [[[[1, 2]]]])
    unit_path(tmp_path, 0).write_bytes(b"damage")
    with pytest.raises(ValueError, match="cannot be read"):
        opened.tokens(0)
