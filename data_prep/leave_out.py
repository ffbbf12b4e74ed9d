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
from data_prep.columns import Columns, blocks
from data_prep.documents import read_unit
from data_prep.dropped import REASONS, Cuts, Dropped, DroppedFiles, in_order, kept_in
from data_prep.duplicates.by_unit import of_units
from data_prep.duplicates.contamination import CONTAMINATED, Scan, Searcher, write_reference
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
    scratch: Path,
) -> Iterator[Dropped]:
    """All that is left out, in order; `duplicates`: documents with the text of an earlier one, and the first that has it."""
    exact = duplicates if options.deduplicate else (np.zeros(0, np.int64),) * 2
    parts = [kept_in(scratch / "exact", _exact(exact[0], exact[1], columns))]
    if settings := near_settings(options, tokenizer):
        places = output / TOKENS_FOLDER, output / WORK_FOLDER
        near = find_near_duplicates(*places, settings, ledgers, token_bytes(tokenizer), workers)
        parts.append(kept_in(scratch / "near", (rows.select(~_among(exact[0], rows.doc)) for rows in near)))
    return in_order(parts)


def _exact(doc: np.ndarray, of: np.ndarray, columns: Columns) -> Iterator[Dropped]:
    for block in blocks(0, len(doc)):
        mine = doc[block]
        reasons, similar = np.full(len(mine), EXACT, np.uint8), np.ones(len(mine))
        places = mine, np.zeros_like(mine), columns.length[mine]
        yield Dropped(*places, reasons, similar, of[block], columns.nbytes[mine])


def _among(numbers: np.ndarray, some: np.ndarray) -> np.ndarray:
    """bool: which of `some` are among `numbers`, both ascending."""
    first, last = np.searchsorted(numbers, [some[0], some[-1] + 1]).tolist() if len(some) else (0, 0)
    return np.isin(some, numbers[first:last])


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
    scratch: Path,
) -> Iterator[Dropped]:
    """What of the training documents stands in validation or evaluation texts as well, in order; the split's file says 0 of the
    one and 1 of the other, a byte a document.

    Raises ValueError where none of these is as long as an n-gram, or no longer what it was.
    """
    assert options.decontaminate is not None
    tokens, reference = output / TOKENS_FOLDER, output / WORK_FOLDER / "reference"
    reference.parent.mkdir(exist_ok=True)
    first = np.cumsum([0, *(ledger.documents for ledger in ledgers)])
    split = np.memmap(split_file, np.uint8, "r")
    cuts = kept_in(scratch / "cuts", (rows.select(split[rows.doc] != LEFT_OUT) for rows in dropped.pieces()))
    begins = int(tokenizer.bos_id is not None)
    validation = _texts(tokens, first, split, Cuts([(cuts.doc, cuts.begin, cuts.end)]), begins)
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
    searcher = Searcher(tokens, reference, scan, token_bytes(tokenizer), first.tolist(), split_file, scratch / "cuts")
    files, places, held = DroppedFiles(scratch / "found"), dict[int, slice](), 0
    with Progress("searching", sum(ledger.file_bytes for ledger in ledgers)) as progress:
        for unit, found in of_units(searcher, len(ledgers), workers):
            files.add([found])
            places[unit] = slice(held, held := held + len(found.doc))
            progress.advance(ledgers[unit].file_bytes)
    rows = files.mapped()
    return (rows.select(places[unit]) for unit in sorted(places))


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


def merged(dropped: Dropped, contaminated: Dropped, lengths: np.ndarray) -> Iterator[Dropped]:
    """Both, in order; a document that is left out as a whole has one row."""
    for rows in in_order([dropped, contaminated]):
        last = rows.reason == CONTAMINATED
        yield rows.select(last | ~np.isin(rows.doc, rows.doc[last & rows.whole(lengths)]))


def cut_columns(columns: Columns, dropped: Dropped) -> None:
    """Make lengths and bytes of documents that lack a part those of what stays."""
    for rows in dropped.pieces():
        cut = rows.select(~rows.whole(columns.length))
        np.subtract.at(columns.length, cut.doc, cut.end - cut.begin)
        np.subtract.at(columns.nbytes, cut.doc, cut.nbytes)
        columns.nbytes[cut.doc] = np.maximum(columns.nbytes[cut.doc], 0)


def dropped_statistics(dropped: Dropped) -> dict[str, Any]:
    """By reason, the documents and tokens that are left out."""
    found: dict[str, Any] = {}
    for rows in dropped.pieces():
        for number in np.unique(rows.reason).tolist():
            mine = rows.select(rows.reason == number)
            counts = found.setdefault(REASONS[number], dict.fromkeys(("count", "documents", "tokens", "bytes"), 0))
            counts["count"] += len(mine.doc)
            counts["documents"] += len(np.unique(mine.doc))
            counts["tokens"] += int((mine.end - mine.begin).sum())
            counts["bytes"] += int(mine.nbytes.sum())
    return {reason: found[reason] for reason in REASONS if reason in found}
