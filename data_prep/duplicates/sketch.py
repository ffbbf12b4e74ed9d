"""MinHash: what is remembered of a document or section to find others that share most of its n-grams.

One hash of every n-gram, the circle of all hashes cut into SLOTS arcs, and of each arc the smallest hash, an empty
one taking that of the next (Li, Owen and Zhang 2012, "One Permutation Hashing"; Shrivastava and Li 2014, "Densifying One
Permutation Hashing via Rotation for Fast Near Neighbor Search"): each slot is equal in two sets with the probability of
their Jaccard similarity. Bands of slots are hashed together; two sets that are equal in a band are candidates (Indyk
and Motwani 1998, in the form of Broder et al.).

    WORK/unit-00000.documents.arrow, WORK/unit-00000.sections.arrow
    doc int64 (in its unit), begin int64, end int64 (tokens), slots binary(SLOTS): a byte of each, band00, band01, ... uint64
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from data_prep.duplicates.ngrams import BASE, BLOCK, EMPTY, hashes, mixed
from data_prep.duplicates.sections import Paragraphs, Texts, sections
from data_prep.ledger import unit_path
from storage.atomic import new_stream

SLOTS = 120
CERTAIN = 0.99
"""Chance that two sets, exactly as similar as the threshold, are equal in at least one band."""
LEVELS = ("documents", "sections")


def rows_of_band(threshold: float) -> int:
    """The most slots in a band (of SLOTS / them bands) with which candidates are found as surely as CERTAIN."""
    divisors = (rows for rows in range(1, SLOTS + 1) if SLOTS % rows == 0)
    return max(rows for rows in divisors if 1 - (1 - threshold**rows) ** (SLOTS // rows) >= CERTAIN)


class NearSettings(NamedTuple):
    """How near-duplicates are looked for; `levels`: the similarity from which documents, and sections, are repetitions."""

    levels: dict[str, float]
    ngram: int
    section_tokens: int
    begins: int
    """Tokens before a document's text: 1 where the tokenizer has BOS, else 0; one is behind it."""


class Sketcher:
    """Sketches whole units of a token store in `tokens` into `work`."""

    def __init__(self, tokens: Path, work: Path, settings: NearSettings, pieces: list[bytes]) -> None:
        self.tokens, self.work, self.settings = tokens, work, settings
        self.paragraphs = Paragraphs(pieces)

    def run(self, unit: int) -> int:
        """Write the sketches of a unit that are not there yet; return its number."""
        for level, threshold in self.settings.levels.items():
            path = sketch_path(self.work, unit, level)
            if not path.exists():
                rows = rows_of_band(threshold)
                parts = [_columns(*part, rows, self.settings.ngram) for part in self._items(unit, level)]
                with new_stream(path, _schema(SLOTS // rows)) as stream:
                    if parts:
                        stream.write_batch(_record_batch(parts, SLOTS // rows))
        return unit

    def _items(self, unit: int, level: str) -> Iterator[tuple[Texts, np.ndarray]]:
        """Of each batch of the unit what has n-grams, and which document it belongs to (an int64 in the unit)."""
        before = 0
        for ids, offsets in read_batches(unit_path(self.tokens, unit)):
            content = Texts(ids, offsets[:-1] + self.settings.begins, offsets[1:] - 1)
            items = sections(content, self.paragraphs, self.settings.section_tokens) if level == "sections" else content
            doc = np.searchsorted(offsets, items.begin, side="right") - 1
            kept = items.end - items.begin >= self.settings.ngram
            items = Texts(ids, items.begin[kept], items.end[kept])
            yield items, np.stack([before + doc[kept], *(edge - offsets[doc[kept]] for edge in items[1:])])
            before += len(offsets) - 1


def read_batches(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Ids of each batch of a unit's file, and where each of its documents begins and the last one ends."""
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        for batch in stream:
            column = batch["tokens"]
            offsets = column.offsets.to_numpy()
            yield column.values.to_numpy()[offsets[0] : offsets[-1]], offsets - offsets[0]


def sketch_path(work: Path, unit: int, level: str) -> Path:
    return work / f"unit-{unit:05d}.{level}.arrow"


def _schema(bands: int) -> pa.Schema:
    columns = {"doc": pa.int64(), "begin": pa.int64(), "end": pa.int64(), "slots": pa.binary(SLOTS)}
    return pa.schema(columns | {f"band{band:02d}": pa.uint64() for band in range(bands)})


def _columns(items: Texts, places: np.ndarray, rows: int, ngram: int) -> list[np.ndarray]:
    signature = signatures(items, ngram)
    slots = (signature.T & np.uint64(0xFF)).astype(np.uint8)
    return [*places, slots, *bands(signature, rows)]


def _record_batch(parts: list[list[np.ndarray]], bands_: int) -> pa.RecordBatch:
    schema, columns = _schema(bands_), [np.concatenate(column) for column in zip(*parts, strict=True)]
    arrays = [
        pa.Array.from_buffers(field.type, len(column), [None, pa.py_buffer(np.ascontiguousarray(column))])
        for field, column in zip(schema, columns, strict=True)
    ]
    return pa.record_batch(arrays, schema=schema)


def signatures(items: Texts, ngram: int) -> np.ndarray:
    """uint64 [SLOTS, items]; every item has at least one n-gram."""
    count = len(items.begin)
    found = np.full((SLOTS, count), EMPTY)
    if count:
        grams = hashes(items.ids, ngram)
        sizes = items.end - items.begin - ngram + 1
        ends = np.cumsum(sizes)
        shift = items.begin - (ends - sizes)  # from a place among the items' n-grams to one in `grams`
        for first in range(0, int(ends[-1]), BLOCK):
            place = np.arange(first, min(first + BLOCK, int(ends[-1])))
            item = np.searchsorted(ends, place, side="right")
            mine = grams[place + shift[item]]
            slot = ((mine >> np.uint64(32)) * np.uint64(SLOTS)) >> np.uint64(32)
            np.minimum.at(found.reshape(-1), slot.astype(np.int64) * count + item, mine)
    for slot in (*range(SLOTS - 2, -1, -1), SLOTS - 1, *range(SLOTS - 2, -1, -1)):
        empty = found[slot] == EMPTY
        found[slot, empty] = found[(slot + 1) % SLOTS, empty]
    return found


def bands(signature: np.ndarray, rows: int) -> np.ndarray:
    """uint64 [SLOTS / rows, items]: a hash of the slots of each band."""
    parts = signature.reshape(SLOTS // rows, rows, -1)
    found = np.zeros((SLOTS // rows, signature.shape[1]), np.uint64)
    for row in range(rows):
        found = mixed(found * np.uint64(BASE) + parts[:, row])
    return found
