"""The token store: every document's ids, boundaries explicit, independent of the sequence length.

    DATA/tokens/unit-00000.arrow   documents of one unit of work, in input order (Arrow stream)
    DATA/tokens/unit-00000.json    its ledger: written after the unit is complete, so a unit without one does not exist
    DATA/tokens/index.arrow        one row per stored document of all units: length, bytes, source, split
    DATA/tokens/keys.arrow         the documents by the hashes of their keys (storage/lookup.py)
    DATA/tokens/dropped.arrow      what is left out of them and why, if anything is (data_prep/dropped.py)

    column    type                       per document
    tokens    large_list<uint16|uint32>  ids, BOS (where the tokenizer has one) and EOS included
    key       string                     id field or place in the input
    nbytes    int64                      UTF-8 bytes of the text
    key_hash  uint64                     decides the split
    text_hash fixed_size_binary(16)      finds exact duplicates

and where only a part of the tokens carries loss (conversations):

    targets       list<fixed_size_list<int64>[2]>  these tokens, from and to (exclusive), ascending
    target_bytes  int64                            UTF-8 bytes of their text

and where a field of the input names it:

    source    string                     what the document counts as a part of

A document's number is its position over all units. Those that are left out keep theirs. Of a document that lacks a part,
length, bytes and tokens are those of the rest.
"""

import hashlib
import json
from bisect import bisect_right
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.columns import Columns, blocks
from data_prep.dropped import Cuts
from data_prep.ledger import unit_path
from data_prep.sources import hash64
from data_prep.targets import Spans, joined
from data_prep.unit_file import UnitFile
from storage.atomic import new_stream
from storage.lookup import Lookup, write_lookup

INDEX_FILE, KEYS_FILE = "index.arrow", "keys.arrow"
SPLITS = ("train", "validation")
LEFT_OUT = len(SPLITS)  # the split number of a document that is dropped
OPEN_UNITS = 64
INDEX_SCHEMA = {"length": pa.int64(), "nbytes": pa.int64(), "source": pa.uint16(), "split": pa.uint8()}


def write_index(
    folder: Path, columns: Columns, split: np.ndarray, units: list[int], sources: list[str], prefixes: list[str]
) -> Lookup:
    """What a store has beside its units; returns its index of keys.

    `split[d]` is a position in SPLITS or LEFT_OUT; `units[u]` the number of documents in unit u; `prefixes`: what stood
    before a key, in one unit or another, when it was hashed (`data_prep.sources.key_prefix`).
    """
    digest = hashlib.sha256()
    for block in blocks(0, len(split)):
        digest.update(np.ascontiguousarray(columns.key_hash[block]).data)
    keys = digest.hexdigest()
    pairs = ((columns.key_hash[block], np.arange(block.start, block.stop)) for block in blocks(0, len(split)))
    write_lookup(folder / KEYS_FILE, keys, pairs)
    metadata = {"units": json.dumps(units), "sources": json.dumps(sources), "keys": keys}
    metadata["prefixes"] = json.dumps(prefixes)
    schema = pa.schema(INDEX_SCHEMA, metadata)
    arrays = [
        pa.Array.from_buffers(field.type, len(split), [None, pa.py_buffer(column)])
        for field, column in zip(
            schema, (columns.length, columns.nbytes, columns.source, split.astype(np.uint8, copy=False)), strict=True
        )
    ]
    with new_stream(folder / INDEX_FILE, schema) as stream:
        stream.write_batch(pa.record_batch(arrays, schema=schema))
    lookup = Lookup.open(folder / KEYS_FILE, keys)
    assert lookup is not None
    return lookup


class TokenStore:
    """Read access by memory map: opening reads no token."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        try:
            with pa.memory_map(str(self.folder / INDEX_FILE)) as file, pa.ipc.open_stream(file) as stream:
                index, metadata = stream.read_all(), stream.schema.metadata
        except (OSError, pa.ArrowInvalid) as error:
            raise ValueError(f"{folder} is not a complete token store: {error}") from None
        chunks = [index[name].chunks for name in INDEX_SCHEMA]  # one of each, as it was written: mapped, not read
        columns = [np.concatenate([c.to_numpy() for c in cs]) if len(cs) != 1 else cs[0].to_numpy() for cs in chunks]
        self._length, self._nbytes, self._source, self._split = columns
        self.sources: list[str] = json.loads(metadata[b"sources"])
        self._unit_ends: list[int] = np.cumsum(json.loads(metadata[b"units"]), dtype=np.int64).tolist()
        self._by_key = Lookup.open(self.folder / KEYS_FILE, metadata.get(b"keys", b"").decode())
        self._prefixes: list[str] = json.loads(metadata.get(b"prefixes", b"[]"))
        self._cuts: Cuts | None = None
        self._open: OrderedDict[int, UnitFile] = OrderedDict()

    @classmethod
    def open(cls, folder: str | Path) -> "TokenStore":
        return cls(Path(folder))

    def __len__(self) -> int:
        return len(self._length)

    @property
    def dtype(self) -> np.dtype:
        return self._unit(0).dtype

    def documents(
        self, split: str, source: str | None = None, first: int = 0, end: int | None = None
    ) -> "StoredDocuments":
        """The documents of a split (of one source) among those from `first` to `end`, in input order."""
        number, found = None if source is None else self.sources.index(source), [np.zeros(0, np.int64)]
        for block in blocks(first, min(len(self), len(self) if end is None else end)):
            chosen = self._split[block] == SPLITS.index(split)
            if number is not None:
                chosen &= self._source[block] == number
            found.append(block.start + np.flatnonzero(chosen))
        return StoredDocuments(self, np.concatenate(found))

    def totals(self) -> dict[tuple[str, str], tuple[int, int, int]]:
        """Documents, bytes and tokens of each split and source that has documents."""
        sums = np.zeros((3, len(SPLITS) + 1, len(self.sources) + 1), np.int64)
        for block in blocks(0, len(self)):
            place = np.minimum(self._split[block], len(SPLITS)), np.minimum(self._source[block], len(self.sources))
            for counted, values in zip(sums, (1, self._nbytes[block], self._length[block]), strict=True):
                np.add.at(counted, place, values)
        places = ((i, split, j, name) for i, split in enumerate(SPLITS) for j, name in enumerate(self.sources))
        return {(split, name): tuple(sums[:, i, j].tolist()) for i, split, j, name in places if sums[0, i, j]}

    def tokens(self, doc: int) -> np.ndarray:
        """Ids of document number `doc`: a view into the file, unless it lacks a part."""
        ids = self.stored_tokens(doc)
        if len(ids) == self._length[doc]:
            return ids
        if self._cuts is None:
            self._cuts = Cuts.of_store(self.folder)
        return self._cuts.applied(doc, ids)

    def stored_tokens(self, doc: int) -> np.ndarray:
        """All ids of a document, also those that are left out of it: a view into the file."""
        unit, row = self._place(doc)
        return self._unit(unit).tokens(row)

    def targets(self, docs: np.ndarray) -> tuple[Spans, np.ndarray]:
        """Which tokens of the documents `docs` (ascending) carry loss, and int64 [documents] the bytes of their text.

        Raises ValueError where the store does not say it.
        """
        found = []
        for unit, (start, end) in enumerate(pairwise([0, *self._unit_ends])):
            mine = docs[np.searchsorted(docs, start) : np.searchsorted(docs, end)] - start
            if len(mine):
                found.append(self._unit(unit).targets(mine))
        return joined([spans for spans, _ in found]), np.concatenate([nbytes for _, nbytes in found])

    def key(self, doc: int) -> str:
        unit, row = self._place(doc)
        return self._unit(unit).key(row)

    def find(self, key: str) -> int | None:
        """Number of the first document with this key; a store without an index of keys has them read up to it."""
        if self._by_key:
            same_hash = [document for prefix in self._prefixes for document in self._by_key.find(hash64(prefix + key))]
            return min((document for document in same_hash if self.key(document) == key), default=None)
        start = 0
        for unit, end in enumerate(self._unit_ends):
            row = self._unit(unit).find(key)
            if row is not None:
                return start + row
            start = end
        return None

    @property
    def units(self) -> list[tuple[int, int]]:
        """Number of documents and number of the source (0 if there are none) of each unit."""
        starts = [0, *self._unit_ends]
        return [(end - start, int(self._source[start]) if end > start else 0) for start, end in pairwise(starts)]

    def split(self, doc: int) -> str | None:
        """Split of a document, None where it is dropped."""
        number = int(self._split[doc])
        return None if number == LEFT_OUT else SPLITS[number]

    def length(self, doc: int) -> int:
        """Tokens of a document, without what is left out of it."""
        return int(self._length[doc])

    def lengths(self, documents: slice) -> np.ndarray:
        """Tokens of documents without what is left out of them, none of those that are dropped: int64 [documents]."""
        return np.where(self._split[documents] == LEFT_OUT, 0, self._length[documents])

    def stored_lengths(self, documents: slice) -> np.ndarray:
        """All tokens of documents, int64 [documents]."""
        found = [np.zeros(0, np.int64)]
        for unit, (start, end) in enumerate(pairwise([0, *self._unit_ends])):
            mine = slice(max(documents.start, start) - start, min(documents.stop, end) - start)
            if mine.start < mine.stop:
                found.append(self._unit(unit).lengths()[mine])
        return np.concatenate(found)

    def source(self, doc: int) -> str:
        return self.sources[int(self._source[doc])]

    def _place(self, doc: int) -> tuple[int, int]:
        if not 0 <= doc < len(self):
            raise ValueError(f"there is no document {doc}: {self.folder} holds {len(self)}")
        unit = bisect_right(self._unit_ends, doc)
        return unit, doc - (self._unit_ends[unit - 1] if unit else 0)

    def _unit(self, unit: int) -> "UnitFile":
        if unit in self._open:
            self._open.move_to_end(unit)
        else:
            self._open[unit] = UnitFile(unit_path(self.folder, unit))
            if len(self._open) > OPEN_UNITS:
                self._open.popitem(last=False)
        return self._open[unit]


class StoredDocuments:
    """Some documents of a store; position i has number `doc[i]`."""

    def __init__(self, store: TokenStore, doc: np.ndarray) -> None:
        self.store = store
        self.doc = doc.astype(np.int64)
        self.length = store._length[doc]
        self.nbytes = store._nbytes[doc]

    def __len__(self) -> int:
        return len(self.doc)

    @property
    def dtype(self) -> np.dtype:
        return self.store.dtype

    def tokens(self, i: int) -> np.ndarray:
        return self.store.tokens(int(self.doc[i]))

    def targets(self) -> tuple[Spans, np.ndarray]:
        """As `TokenStore.targets`, of all of them."""
        return self.store.targets(self.doc)

    def key(self, i: int) -> str:
        return self.store.key(int(self.doc[i]))
