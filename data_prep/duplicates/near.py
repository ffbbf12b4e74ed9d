"""Near-duplicates of a complete token store: whole documents, and sections of long ones.

1. sketch: every unit's documents and sections by MinHash, in worker processes (sections.py, sketch.py)
2. candidates: what is equal in a band of its sketch, by way of files (candidates.py)
3. decide: in document order, by exact similarity (decide.py); documents first, then sections of what is left

A document that repeats an earlier one is left out; of any other the sections that repeat an earlier one are cut out (the
whole of it, if nothing is left). All files are in one folder, which is removed when the data set is complete; a run that
was killed goes on with the sketches that are there, and with what was decided.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from console.progress import Progress
from data_prep.columns import scratch_folder
from data_prep.dropped import REASONS, Dropped, in_order, kept_in, ordered, read_dropped, write_dropped
from data_prep.duplicates.by_unit import of_units
from data_prep.duplicates.candidates import Items
from data_prep.duplicates.decide import REPETITION, Deciding
from data_prep.duplicates.sketch import NearSettings, Sketcher, sketch_path
from data_prep.ledger import Ledger
from storage.atomic import write_atomically

WORK_FOLDER = "near-duplicates"
KEY_FILE, DECIDED_FILE = "of", "decided"
DOCUMENT, EMPTIED, SECTION = (
    REASONS.index(name) for name in ("near-duplicate", "repeated sections", "repeated section")
)


def find_near_duplicates(
    tokens: Path, work: Path, settings: NearSettings, ledgers: Sequence[Ledger], pieces: list[bytes], workers: int
) -> Iterator[Dropped]:
    """What repeats something earlier in the token store, in order; `pieces`: the bytes that each token adds to a text.

    Raises ValueError where no document is as long as an n-gram.
    """
    _prepare(work, settings, ledgers)
    decided = work / DECIDED_FILE
    if not decided.exists():
        sketcher = Sketcher(tokens, work, settings, pieces)
        with Progress("sketching", sum(ledger.file_bytes for ledger in ledgers)) as progress:
            for unit in of_units(sketcher, len(ledgers), workers):
                progress.advance(ledgers[unit].file_bytes)
        with scratch_folder(work / "run-found") as scratch:
            write_dropped(work, _decided(tokens, work, scratch, settings, ledgers, sketcher.paragraphs.sizes))
        write_atomically(decided, b"")
    return read_dropped(work)


def _prepare(work: Path, settings: NearSettings, ledgers: Sequence[Ledger]) -> None:
    """A folder for these settings and this store; what another one left is removed."""
    content = [settings._asdict(), [ledger.sha256 for ledger in ledgers]]
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest().encode()
    try:
        found = (work / KEY_FILE).read_bytes()
    except OSError:
        found = b""
    if found != key:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        write_atomically(work / KEY_FILE, key)
    for path in (*work.glob("*.tmp"), *work.glob("run-*.npy")):
        path.unlink()


def _decided(
    tokens: Path, work: Path, scratch: Path, settings: NearSettings, ledgers: Sequence[Ledger], sizes: np.ndarray
) -> Iterator[Dropped]:
    found: list[Dropped] = []
    size = sum(ledger.file_bytes for ledger in ledgers)
    for level, threshold in settings.levels.items():
        items = Items([sketch_path(work, unit, level) for unit in range(len(ledgers))])
        if not len(items):
            raise ValueError(
                f"--ngram {settings.ngram}: no document has so many tokens; choose fewer, or do without near-duplicates"
            )
        documents = [ledger.documents for ledger in ledgers]
        with Progress(f"comparing {level}", size) as progress:
            deciding = Deciding(tokens, documents, items, settings.ngram, sizes, progress, size / len(items))
            gone = found[0].doc if found else np.zeros(0, np.int64)
            pieces = deciding.repetitions(threshold, work, gone)
            rows = (
                (_all_of(piece, DOCUMENT, piece["value"]) for piece in pieces)
                if level == "documents"
                else (_of_sections(piece, settings.begins + 1) for piece in _by_document(pieces))
            )
            found.append(kept_in(scratch / level, rows))
    return in_order(found)


def _all_of(rows: np.ndarray, reason: int, value: np.ndarray) -> Dropped:
    places = np.zeros_like(rows["doc"]), rows["length"]
    return Dropped(rows["doc"], *places, np.full(len(rows), reason, np.uint8), value, rows["of"], rows["nbytes"])


def _by_document(pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The same repetitions in pieces that have all or none of a document."""
    held = np.zeros(0, REPETITION)
    for piece in pieces:
        held = np.concatenate([held, piece])
        end = int(np.searchsorted(held["doc"], held["doc"][-1]))
        if end:
            yield held[:end]
        held = held[end:]
    if len(held):
        yield held


def _of_sections(cuts: np.ndarray, around: int) -> Dropped:
    """Of sections that repeat others; `around`: tokens of a document that are no text."""
    _, first, counts = np.unique(cuts["doc"], return_index=True, return_counts=True)
    emptied = np.add.reduceat(cuts["end"] - cuts["begin"], first) == cuts["length"][first] - around
    similar, nbytes = np.minimum.reduceat(cuts["value"], first), np.add.reduceat(cuts["nbytes"], first)
    of_emptied = cuts[first[emptied]]
    of_emptied["nbytes"] = nbytes[emptied]
    left = cuts[np.repeat(~emptied, counts)]
    reasons = np.full(len(left), SECTION, np.uint8)
    cut_out = Dropped(left["doc"], left["begin"], left["end"], reasons, left["value"], left["of"], left["nbytes"])
    return ordered([_all_of(of_emptied, EMPTIED, similar[emptied]), cut_out])
