"""The index step decides as plain lists would, however few documents are looked at together, and in the same memory for more."""

import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import columns, dropped
from data_prep.index import Indexed, Tokenized, index_store
from data_prep.ledger import Ledger, unit_path
from data_prep.options import BuildOptions
from data_prep.store import SPLITS, TokenStore
from data_prep.unit_file import DocumentBatch, write_unit
from storage import lookup
from storage.manifest import PackingPolicy
from tests.properties import examples

FILES = "index.arrow", "keys.arrow", "dropped.arrow"


def write_units(folder: Path, units: list[list[tuple[int, int, int, str]]]) -> Tokenized:
    """Of documents, each a text (its number), a key (its number), a length and a source."""
    (folder / "tokens").mkdir(parents=True)
    ledgers = []
    for unit, documents in enumerate(units):
        texts, keys, lengths, sources = zip(*documents, strict=True)
        batch = DocumentBatch(
            np.ones(sum(lengths), np.uint16),
            np.array(lengths),
            [str(key) for key in keys],
            [text % 3 for text in texts],
            [hashed(key) for key in keys],
            [np.array([hashed(text // 2), text // 4], np.uint64).tobytes() for text in texts],
            sources=list(sources),
        )
        write_unit(unit_path(folder / "tokens", unit), np.dtype(np.uint16), iter([batch]), sources=True)
        ledgers.append(
            Ledger(unit=unit, plan_sha256="", input_sha256="", sha256="", file_bytes=0, documents=len(texts))
        )
    return Tokenized(ledgers, [0] * len(units), {}, {}, {}, {})


def content(path: Path) -> bytes | list[dict]:
    """Of a file that is the same however many documents are looked at together, or of which the rows are."""
    if path.name != "dropped.arrow":
        return path.read_bytes()
    with pa.ipc.open_stream(path) as stream:
        return stream.read_all().to_pylist()


def hashed(number: int) -> int:
    return number * 0x9E3779B97F4A7C15 % 2**64


def index(folder: Path, made: Tokenized, tokenizer, together: int, part: int, run: int, **options) -> Indexed:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "LOOKED_AT", together)
        patch.setattr(columns, "PART_DOCUMENTS", part)
        patch.setattr(dropped, "ROWS_TOGETHER", part)
        patch.setattr(lookup, "LOOKED_AT", part)
        patch.setattr(lookup, "RUN", run)
        chosen = BuildOptions(packing=PackingPolicy(seq_length=16), **options)
        return index_store(chosen, ["documents"], tokenizer, made, folder, 1)


def expected_split(documents: list, fraction: float, left_out: set[int]) -> list[str | None]:
    by_hash = [SPLITS[hashed(key) < int(fraction * 2**64)] for _, key, *_ in documents]
    split = [None if i in left_out else name for i, name in enumerate(by_hash)]
    for source in sorted({source for *_, source in documents}):
        mine = [i for i, document in enumerate(documents) if document[3] == source and i not in left_out]
        for wanted, pick in (("validation", min), ("train", max)):
            if len(mine) >= 2 and wanted not in [split[i] for i in mine]:
                split[pick(mine, key=lambda i: hashed(documents[i][1]))] = wanted
    return split


document = st.tuples(st.integers(0, 30), st.integers(1, 40), st.integers(1, 5), st.sampled_from("abcd"))


@examples(30)
@given(
    units=st.lists(st.lists(document, min_size=1, max_size=25), min_size=1, max_size=4),
    fraction=st.sampled_from([0.01, 0.5, 0.99]),
    remove=st.booleans(),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 30)),
)
def test_decided_as_from_lists(tokenizer, tmp_path_factory, units, fraction, remove, sizes):
    documents = [document for unit in units for document in unit]
    texts = [(text // 2, text // 4, text % 3) for text, *_ in documents]
    in_order: dict[tuple, list[int]] = {}
    for i, text in enumerate(texts):
        in_order.setdefault(text[:2], []).append(i)
    repeated = {j for same in in_order.values() for i, j in pairwise(same) if texts[i] == texts[j]}
    split = expected_split(documents, fraction, repeated if remove else set())
    options = {"deduplicate": remove, "validation_fraction": fraction}
    folder, other = (tmp_path_factory.mktemp("index") for _ in range(2))
    made = write_units(folder / "data", units)
    if not {"train", "validation"} <= set(split):
        with pytest.raises(ValueError, match=f"{len(split)} document.s. leave none for"):
            index(folder / "data", made, tokenizer, *sizes, **options)
    else:
        found = index(folder / "data", made, tokenizer, *sizes, **options).numbers
        store = TokenStore.open(folder / "data" / "tokens")
        assert [store.split(i) for i in range(len(store))] == split
        assert [store.source(i) for i in range(len(store))] == [source for *_, source in documents]
        lengths = Counter(document[2] for document, name in zip(documents, split, strict=True) if name)
        assert (found.lengths.tolist(), found.counts.tolist()) == tuple(
            map(list, zip(*sorted(lengths.items()), strict=True))
        )
        assert found.bytes == sum(text[2] for text, name in zip(texts, split, strict=True) if name)
        assert found.duplicates == len(repeated)
        assert found.repeated_keys == len(documents) - len({key for _, key, *_ in documents})
        if sizes[2] > len(documents):  # the runs of keys.arrow are in the file
            again = write_units(other / "data", units)
            index(other / "data", again, tokenizer, 1 << 20, 1 << 20, sizes[2], **options)
            for file in FILES:
                paths = [place / "data" / "tokens" / file for place in (folder, other)]
                assert paths[0].exists() == paths[1].exists()
                assert not paths[0].exists() or content(paths[0]) == content(paths[1])
    assert [path.name for path in (folder / "data").iterdir()] == ["tokens"]


def test_memory_grows_neither_with_the_documents_nor_with_those_left_out(tokenizer, tmp_path):
    peaks = []
    for units in (2, 12):
        numbers = range(2000)
        made = write_units(
            tmp_path / str(units),
            [[(2 * (7 * u + n), 2000 * u + n + 1, 2, "ab"[n % 2]) for n in numbers] for u in range(units)],
        )
        tracemalloc.start()
        found = index(tmp_path / str(units), made, tokenizer, 500, 500, 500, validation_fraction=0.1, deduplicate=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert found.numbers.duplicates > 1900 * (units - 1)
    assert peaks[1] < peaks[0] + 10_000 * 8  # of 20,000 more documents
