"""MinHash: what is remembered of a document or section to find others that share most of its n-grams.

One hash of every n-gram, the circle of all hashes cut into SLOTS arcs, and of each arc the smallest hash, an empty
one taking that of the next (Li, Owen and Zhang 2012, "One Permutation Hashing"; Shrivastava and Li 2014, "Densifying One
Permutation Hashing via Rotation for Fast Near Neighbor Search"): each slot is equal in two sets with the probability of
their Jaccard similarity. Bands of slots are hashed together; two sets that are equal in a band are candidates (Indyk
and Motwani 1998, in the form of Broder et al.).

    WORK/unit-00000.documents.arrow, WORK/unit-00000.sections.arrow
    doc int64 (in its unit), begin int64, end int64 (tokens), slots binary(SLOTS): a byte of each, band00, band01, ... uint64
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from data_prep.duplicates.ngrams import BASE, BLOCK, EMPTY, distinct, hashes, mixed
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
        paths = {level: sketch_path(self.work, unit, level) for level in self.settings.levels}
        missing = [level for level, path in paths.items() if not path.exists()]
        parts: list[list[list[np.ndarray]]] = [[] for _ in missing]
        before = 0
        for ids, offsets in read_batches(unit_path(self.tokens, unit)) if missing else ():
            items = [self._items(ids, offsets, level) for level in missing]
            found = signatures(hashes(ids, self.settings.ngram), [(begin, last) for begin, _, last in items])
            for level, part, (begin, end, _), signature in zip(missing, parts, items, found, strict=True):
                doc = np.searchsorted(offsets, begin, side="right") - 1
                places = before + doc, begin - offsets[doc], end - offsets[doc]
                slots = np.ascontiguousarray(signature.astype(np.uint8).T)  # the lowest byte of each
                part.append([*places, slots, *bands(signature, rows_of_band(self.settings.levels[level]))])
            before += len(offsets) - 1
        for level, part in zip(missing, parts, strict=True):
            count = SLOTS // rows_of_band(self.settings.levels[level])
            with new_stream(paths[level], _schema(count)) as stream:
                if part:
                    stream.write_batch(_record_batch(part, count))
        return unit

    def _items(self, ids: np.ndarray, offsets: np.ndarray, level: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of a batch, where what has n-grams begins and ends, and where the n-grams in it end to begin."""
        content = Texts(ids, offsets[:-1] + self.settings.begins, offsets[1:] - 1)
        items = sections(content, self.paragraphs, self.settings.section_tokens) if level == "sections" else content
        kept = items.end - items.begin >= self.settings.ngram
        return items.begin[kept], items.end[kept], items.end[kept] - self.settings.ngram + 1


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


def _record_batch(parts: list[list[np.ndarray]], bands_: int) -> pa.RecordBatch:
    schema, columns = _schema(bands_), [np.concatenate(column) for column in zip(*parts, strict=True)]
    arrays = [
        pa.Array.from_buffers(field.type, len(column), [None, pa.py_buffer(np.ascontiguousarray(column))])
        for field, column in zip(schema, columns, strict=True)
    ]
    return pa.record_batch(arrays, schema=schema)


def signatures(grams: np.ndarray, levels: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[np.ndarray]:
    """uint64 [SLOTS, items] of each level: stretches begin:end of these hashes, in order, none of them empty.

    All edges of all levels cut the hashes into intervals, whose minima are taken once; an item's are those of its intervals.
    """
    cuts = distinct(np.concatenate([[0, len(grams)], *chain(*levels)]))
    minima = _minima(grams, cuts)
    return [_filled(_of_intervals(minima, *(np.searchsorted(cuts, edge) for edge in level))) for level in levels]


def _minima(grams: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """uint64 [intervals + 1, SLOTS]: the smallest hash of each slot, EMPTY where there is none and in the last row."""
    minima = np.full((len(cuts), SLOTS), EMPTY)
    places = np.repeat(np.arange(0, SLOTS * (len(cuts) - 1), SLOTS), np.diff(cuts))
    for first in range(0, len(grams), BLOCK):
        part = grams[first : first + BLOCK]
        slots = part >> np.uint64(32)
        slots *= np.uint64(SLOTS)
        slots >>= np.uint64(32)
        np.minimum.at(minima.reshape(-1), places[first : first + BLOCK] + slots.view(np.int64), part)
    return minima


def _of_intervals(minima: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """uint64 [SLOTS, items]: minima over the rows first:last of each item."""
    if not len(first):
        return np.zeros((SLOTS, 0), np.uint64)
    return np.ascontiguousarray(np.minimum.reduceat(minima, np.stack([first, last], axis=1).reshape(-1))[::2].T)


def _filled(found: np.ndarray) -> np.ndarray:
    """The same array, each empty slot with what is in the next one that is not, around the circle."""
    for slot in range(SLOTS - 2, -1, -1):
        np.copyto(found[slot], found[slot + 1], where=found[slot] == EMPTY)
    around = np.flatnonzero(found[-1] == EMPTY)
    last = SLOTS - 1
    while len(around):
        found[last, around] = found[0, around]
        last -= 1
        around = around[found[last, around] == EMPTY]
    return found


def bands(signature: np.ndarray, rows: int) -> np.ndarray:
    """uint64 [SLOTS / rows, items]: a hash of the slots of each band."""
    parts = signature.reshape(SLOTS // rows, rows, -1)
    found = np.zeros((SLOTS // rows, signature.shape[1]), np.uint64)
    for row in range(rows):
        found = mixed(found * np.uint64(BASE) + parts[:, row])
    return found
