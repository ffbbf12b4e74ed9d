"""What of the training documents stands in the validation split or in evaluation files, word for word.

Every n-gram of these reference texts is kept as a hash, 8 bytes a token, in a file that all workers map. A section
(sections.py) of a training document in which such an n-gram begins, ends or lies is cut out; the rest is looked at again, since
what a cut joins may be one, until there is none. A conversation is left out as a whole, and so is a document of which nothing
stays. Two n-grams that only share a 64-bit hash cost a section, so none is missed.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.dropped import REASONS, Cuts, Dropped, dropped_of, mapped_from
from data_prep.duplicates.candidates import SortedRuns
from data_prep.duplicates.ngrams import hashes
from data_prep.duplicates.sections import Paragraphs, Texts, sections
from data_prep.duplicates.sketch import read_batches
from data_prep.ledger import unit_path
from storage.atomic import publish

CONTAMINATED = REASONS.index("contaminated")
FILTER_BITS = 24


class Reference:
    """The n-grams of the texts that must not be trained on, by their hashes."""

    def __init__(self, path: Path, ngram: int) -> None:
        self.ngram = ngram
        self._hashes = np.memmap(path, np.uint64, "r")
        self._seen = np.zeros(1 << FILTER_BITS, bool)
        self._seen[self._hashes >> np.uint64(64 - FILTER_BITS)] = True

    def begins(self, ids: np.ndarray) -> np.ndarray:
        """Positions at which one of these n-grams begins, ascending."""
        found = hashes(ids, self.ngram)
        possible = np.flatnonzero(self._seen[found >> np.uint64(64 - FILTER_BITS)])
        wanted = found[possible]
        place = np.searchsorted(self._hashes, wanted).clip(max=len(self._hashes) - 1)
        return possible[self._hashes[place] == wanted]


def write_reference(path: Path, texts: Iterable[np.ndarray], ngram: int) -> tuple[int, int]:
    """Keep the n-grams of texts (ids without BOS and EOS), sorted by way of files beside `path`; returns how many texts have
    one, and how many are too short."""
    long = short = 0
    runs = SortedRuns(path.parent)
    for ids in texts:
        if len(ids) < ngram:
            short += 1
            continue
        long += 1
        runs.add(hashes(ids, ngram))
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        for part in runs.merged():
            file.write(part.data)
    publish(temporary, path)
    return long, short


class Scan(NamedTuple):
    """How training documents are searched; `begins` as of sketch.NearSettings."""

    ngram: int
    section_tokens: int
    begins: int
    whole: bool
    """Nothing is cut out of documents: they are left out."""


class Searcher:
    """Searches whole units of a token store; `first_doc[u]` is the number of the first document of unit u, `split` a file that
    says 0 of a document that is trained on, `cuts` a folder of what is cut out of them already."""

    def __init__(
        self,
        tokens: Path,
        reference: Path,
        scan: Scan,
        pieces: list[bytes],
        first_doc: Sequence[int],
        split: Path,
        cuts: Path,
    ) -> None:
        self.tokens, self.reference, self.scan = tokens, reference, scan
        self.paragraphs = Paragraphs(pieces)
        self.first_doc, self.split, self._cuts_folder = first_doc, split, cuts
        self._opened: Reference | None = None

    def run(self, unit: int) -> tuple[int, Dropped]:
        """The unit, and what is to be left out of its documents beside what is cut out of them already."""
        if self._opened is None:
            self._opened = Reference(self.reference, self.scan.ngram)
            self._split = np.memmap(self.split, np.uint8, "r")
            cuts = mapped_from(self._cuts_folder)
            self._cut_docs, self._cuts = cuts.doc, Cuts([(cuts.doc, cuts.begin, cuts.end)])
        rows: list[tuple] = []
        doc = int(self.first_doc[unit])
        for ids, offsets in read_batches(unit_path(self.tokens, unit)):
            for row in self._suspects(ids, offsets, doc):
                rows += self._of_document(doc + row, ids[offsets[row] : offsets[row + 1]])
            doc += len(offsets) - 1
        return unit, dropped_of(rows)

    def _suspects(self, ids: np.ndarray, offsets: np.ndarray, first: int) -> list[int]:
        """Documents of a batch with one of the n-grams, or with cuts, which may have joined one."""
        assert self._opened is not None
        begins = self._opened.begins(ids)
        rows = np.unique(np.searchsorted(offsets, begins, side="right") - 1)
        mine = slice(*np.searchsorted(self._cut_docs, [first, first + len(offsets) - 1]).tolist())
        rows = np.union1d(rows, self._cut_docs[mine] - first)
        return rows[self._split[first + rows] == 0].tolist()

    def _of_document(self, doc: int, ids: np.ndarray) -> Iterator[tuple]:
        """Rows of `Dropped`."""
        assert self._opened is not None
        scan, size = self.scan, len(ids)
        begin, end = scan.begins, size - 1
        stays = np.zeros(size, bool)
        stays[self._cuts.applied(doc, np.arange(size))] = True
        before = stays.copy()
        content = Texts(ids, np.array([begin]), np.array([end]))
        section = np.searchsorted(
            sections(content, self.paragraphs, scan.section_tokens).end, np.arange(size), side="right"
        )
        shared = 0
        while True:
            places = np.flatnonzero(stays[begin:end]) + begin
            found = self._opened.begins(ids[places])
            if not len(found):
                break
            shared += len(found)
            touched = np.unique(section[places[(found[:, None] + np.arange(scan.ngram)).reshape(-1)]])
            stays[begin:end] &= not scan.whole and ~np.isin(section[begin:end], touched)
        if not shared:
            return
        edges = np.flatnonzero(np.diff(before & ~stays, prepend=False, append=False)).reshape(-1, 2).tolist()
        if not np.any(stays[begin:end]):
            edges = [[0, size]]
        for low, high in edges:
            nbytes = int(self.paragraphs.sizes[ids[low:high]].sum())
            yield doc, low, high, CONTAMINATED, float(shared), -1, nbytes
