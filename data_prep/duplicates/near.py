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
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from console.progress import Progress
from data_prep.dropped import REASONS, Dropped, ordered, read_dropped, write_dropped
from data_prep.duplicates.by_unit import of_units
from data_prep.duplicates.candidates import Items
from data_prep.duplicates.decide import REPETITION, Deciding
from data_prep.duplicates.sketch import LEVELS, NearSettings, Sketcher, sketch_path
from data_prep.ledger import Ledger
from storage.atomic import write_atomically

WORK_FOLDER = "near-duplicates"
KEY_FILE, DECIDED_FILE = "of", "decided"
DOCUMENT, EMPTIED, SECTION = (
    REASONS.index(name) for name in ("near-duplicate", "repeated sections", "repeated section")
)


def find_near_duplicates(
    tokens: Path, work: Path, settings: NearSettings, ledgers: Sequence[Ledger], pieces: list[bytes], workers: int
) -> Dropped:
    """What repeats something earlier in the token store; `pieces`: the bytes that each token adds to a text.

    Raises ValueError where no document is as long as an n-gram.
    """
    _prepare(work, settings, ledgers)
    decided = work / DECIDED_FILE
    if not decided.exists():
        sketcher = Sketcher(tokens, work, settings, pieces)
        with Progress("sketching", sum(ledger.file_bytes for ledger in ledgers)) as progress:
            for unit in of_units(sketcher, len(ledgers), workers):
                progress.advance(ledgers[unit].file_bytes)
        write_dropped(work, _decided(tokens, work, settings, ledgers, sketcher.paragraphs.sizes))
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
    for path in (*work.glob("*.tmp"), *work.glob("run-*")):
        path.unlink()


def _decided(tokens: Path, work: Path, settings: NearSettings, ledgers: Sequence[Ledger], sizes: np.ndarray) -> Dropped:
    found = dict.fromkeys(LEVELS, np.zeros(0, REPETITION))
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
            found[level] = deciding.repetitions(threshold, work, found["documents"]["doc"])
    return _rows(found["documents"], found["sections"], settings.begins + 1)


def _rows(whole: np.ndarray, cuts: np.ndarray, around: int) -> Dropped:
    """Both levels together; `around`: tokens of a document that are no text."""
    docs, first, counts = np.unique(cuts["doc"], return_index=True, return_counts=True)
    emptied = np.zeros(len(docs), bool)
    similar = cuts["value"]
    if len(docs):
        emptied = np.add.reduceat(cuts["end"] - cuts["begin"], first) == cuts["length"][first] - around
        similar = np.minimum.reduceat(cuts["value"], first)
    of_emptied = cuts[first[emptied]]
    left = cuts[np.repeat(~emptied, counts)]

    def all_of(rows: np.ndarray, reason: int, value: np.ndarray) -> Dropped:
        places = np.zeros_like(rows["doc"]), rows["length"]
        return Dropped(rows["doc"], *places, np.full(len(rows), reason, np.uint8), value, rows["of"], rows["nbytes"])

    reasons = np.full(len(left), SECTION, np.uint8)
    stretches = Dropped(left["doc"], left["begin"], left["end"], reasons, left["value"], left["of"], left["nbytes"])
    of_emptied["nbytes"] = np.add.reduceat(cuts["nbytes"], first)[emptied] if len(docs) else 0
    return ordered([all_of(whole, DOCUMENT, whole["value"]), all_of(of_emptied, EMPTIED, similar[emptied]), stretches])
