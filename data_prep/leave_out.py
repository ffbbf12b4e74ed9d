"""Which of the stored documents, and which parts of them, are left out of a data set: exact and near duplicates, and in
training what stands in validation or evaluation texts.

Decided once all units are there, from the token store and the options alone; kept in `tokens/dropped.arrow`.
"""

import hashlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from console.progress import Progress, say
from data_prep.columns import Columns
from data_prep.documents import read_unit
from data_prep.dropped import REASONS, Cuts, Dropped, dropped_of, ordered
from data_prep.duplicates.by_unit import of_units
from data_prep.duplicates.contamination import Scan, Searcher, write_reference
from data_prep.duplicates.near import WORK_FOLDER, find_near_duplicates
from data_prep.duplicates.sketch import NearSettings, read_batches
from data_prep.elsewhere import open_file
from data_prep.ledger import Ledger, unit_path
from data_prep.options import BuildOptions
from data_prep.plan import TOKENS_FOLDER
from data_prep.records import Problems
from data_prep.sources import parse_sources, plan_units
from data_prep.store import LEFT_OUT
from data_prep.token_bytes import token_bytes
from data_prep.tokenizer import Tokenizer

NGRAM, SECTION_TOKENS = 5, 128
EXACT = REASONS.index("exact duplicate")


def near_settings(options: BuildOptions, tokenizer: Tokenizer) -> NearSettings | None:
    """How near-duplicates are looked for, if they are."""
    levels = {"documents": options.near_duplicates, "sections": options.near_duplicate_sections}
    wanted = {level: threshold for level, threshold in levels.items() if threshold is not None}
    sizes = options.ngram or NGRAM, options.section_tokens or SECTION_TOKENS
    return NearSettings(wanted, *sizes, int(tokenizer.bos_id is not None)) if wanted else None


def find_dropped(
    options: BuildOptions,
    tokenizer: Tokenizer,
    output: Path,
    ledgers: list[Ledger],
    columns: Columns,
    duplicates: tuple[np.ndarray, np.ndarray],
    workers: int,
) -> Dropped:
    """All that is left out; `duplicates`: documents with the text of an earlier one, and the first that has it."""
    parts = [dropped_of([])]
    exact = duplicates if options.deduplicate else (np.zeros(0, np.int64),) * 2
    if settings := near_settings(options, tokenizer):
        places = output / TOKENS_FOLDER, output / WORK_FOLDER
        near = find_near_duplicates(*places, settings, ledgers, token_bytes(tokenizer), workers)
        parts.append(near.select(~np.isin(near.doc, exact[0])))
    doc, of = exact
    reasons, similar = np.full(len(doc), EXACT, np.uint8), np.ones(len(doc))
    parts.append(Dropped(doc, np.zeros_like(doc), columns.length[doc], reasons, similar, of, columns.nbytes[doc]))
    return ordered(parts)


def evaluation_files(places: list[str]) -> dict[str, str]:
    """The files in these places, and the hash of each; raises ValueError where there are none."""
    _, files, _ = plan_units(parse_sources(places, []))
    return {file.path: _sha256(file.path) for file in files}


def find_contaminated(
    options: BuildOptions,
    tokenizer: Tokenizer,
    output: Path,
    split_file: Path,
    ledgers: list[Ledger],
    dropped: Dropped,
    workers: int,
) -> Dropped:
    """What of the training documents stands in validation or evaluation texts as well; the split's file says 0 of the one and
    1 of the other, a byte a document.

    Raises ValueError where none of these is as long as an n-gram, or no longer what it was.
    """
    assert options.decontaminate is not None
    tokens, reference = output / TOKENS_FOLDER, output / WORK_FOLDER / "reference"
    reference.parent.mkdir(exist_ok=True)
    first = np.cumsum([0, *(ledger.documents for ledger in ledgers)])
    split = np.memmap(split_file, np.uint8, "r")
    cuts = dropped.select(split[dropped.doc] != LEFT_OUT)
    begins = int(tokenizer.bos_id is not None)
    validation = _texts(tokens, first, split, Cuts(cuts), begins)
    evaluation = _encoded(options.evaluation or {}, options.text_field, tokenizer)
    long, short = write_reference(reference, chain(validation, evaluation), options.decontaminate)
    if not long:
        raise ValueError(
            f"--decontaminate {options.decontaminate}: no text of the validation split or of --evaluation has so many tokens; "
            "choose fewer"
        )
    if short:
        say(
            f"{short:,} of {long + short:,} texts have fewer than {options.decontaminate} tokens: nothing is searched for them"
        )
    scan = Scan(options.decontaminate, options.section_tokens or SECTION_TOKENS, begins, options.has_chats)
    searcher = Searcher(tokens, reference, scan, token_bytes(tokenizer), first.tolist(), split_file, cuts)
    parts = [dropped_of([])]
    with Progress("searching", sum(ledger.file_bytes for ledger in ledgers)) as progress:
        for found in of_units(searcher, len(ledgers), workers):
            parts.append(found)
            progress.advance(sum(ledger.file_bytes for ledger in ledgers) // len(ledgers))
    return ordered(parts)


def _texts(tokens: Path, first: np.ndarray, split: np.ndarray, cuts: Cuts, begins: int) -> Iterator[np.ndarray]:
    """Ids, without BOS and EOS, of the stored documents for validation."""
    for unit, doc in enumerate(first[:-1].tolist()):
        for ids, offsets in read_batches(unit_path(tokens, unit)):
            for row in np.flatnonzero(split[doc : doc + len(offsets) - 1] == 1).tolist():
                yield cuts.applied(doc + row, ids[offsets[row] : offsets[row + 1]])[begins:-1]
            doc += len(offsets) - 1


def _encoded(files: dict[str, str], text_field: str, tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    for path, sha256 in files.items():
        if _sha256(path) != sha256:
            raise ValueError(f"{path} of --evaluation is gone or has changed: restore it, or choose another --output")
    units, found, _ = plan_units(parse_sources(list(files), [])) if files else ([], [], [])
    for unit in units:
        for document in read_unit(unit, found, text_field, None, Problems("fail")):
            yield np.asarray(tokenizer.encode_batch([document.text])[0], tokenizer.dtype)


def _sha256(path: str) -> str:
    """Of a file's bytes, wherever it is; empty where there is none."""
    try:
        with open_file(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""


def merged(dropped: Dropped, contaminated: Dropped, lengths: np.ndarray) -> Dropped:
    """Both; a document that is left out as a whole has one row."""
    gone = contaminated.doc[contaminated.whole(lengths)]
    return ordered([dropped.select(~np.isin(dropped.doc, gone)), contaminated])


def cut_columns(columns: Columns, dropped: Dropped) -> None:
    """Make lengths and bytes of documents that lack a part those of what stays."""
    cut = dropped.select(~dropped.whole(columns.length))
    np.subtract.at(columns.length, cut.doc, cut.end - cut.begin)
    np.subtract.at(columns.nbytes, cut.doc, cut.nbytes)
    columns.nbytes[cut.doc] = np.maximum(columns.nbytes[cut.doc], 0)


def dropped_statistics(dropped: Dropped) -> dict[str, Any]:
    """By reason, the documents and tokens that are left out."""
    found = {}
    for number, reason in enumerate(REASONS):
        rows = dropped.select(dropped.reason == number)
        if len(rows.doc):
            tokens, nbytes = int((rows.end - rows.begin).sum()), int(rows.nbytes.sum())
            found[reason] = {
                "count": len(rows.doc),
                "documents": len(np.unique(rows.doc)),
                "tokens": tokens,
                "bytes": nbytes,
            }
    return found
