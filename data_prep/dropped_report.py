"""What is left out of a data set, in words (`python -m data_prep.inspect DATA --dropped`), and whether the list is right."""

from collections.abc import Iterator

import numpy as np

from data_prep.columns import blocks
from data_prep.dropped import DROPPED_FILE, REASONS, Dropped, dropped_of, read_dropped
from data_prep.ledger import filtered_of
from data_prep.store import TokenStore
from data_prep.tokenizer import Tokenizer

SHOWN_TOKENS, SHOWN_CHARACTERS = 40, 70


def dropped_lines(store: TokenStore, tokenizer: Tokenizer) -> Iterator[str]:
    """A line a document, or stretch of one: which, why, and how its text begins."""
    for entry in filtered_of(store.folder):
        yield f"document of key {entry.key!r}, not stored: --filter {entry.filter} ({entry.reason})"
    for dropped in read_dropped(store.folder):
        for row in range(len(dropped.doc)):
            doc, begin, end = (int(column[row]) for column in dropped[:3])
            ids = store.stored_tokens(doc)[begin:end][:SHOWN_TOKENS]
            text = " ".join(tokenizer.decode(ids).split())[:SHOWN_CHARACTERS]
            yield f"document {doc}, key {store.key(doc)!r}, {reason_words(store, dropped, row)}: {text}"


def reason_words(store: TokenStore, dropped: Dropped, row: int) -> str:
    """Such as "tokens 12-345 left out: repeated section (0.923, of document 7, key 'a')"."""
    begin, end, of = int(dropped.begin[row]), int(dropped.end[row]), int(dropped.of[row])
    what = "" if store.split(int(dropped.doc[row])) is None else f"tokens {begin:,}-{end - 1:,} "
    original = f", of document {of}, key {store.key(of)!r}" if of >= 0 else ""
    return f"{what}left out: {REASONS[dropped.reason[row]]} ({dropped.value[row]:.3f}{original})"


def reasons_of(store: TokenStore, doc: int) -> Iterator[str]:
    """Why a document, or parts of it, are left out."""
    for dropped in read_dropped(store.folder):
        for row in np.flatnonzero(dropped.doc == doc).tolist():
            yield reason_words(store, dropped, row)


def dropped_problem(store: TokenStore) -> str | None:
    """Why the list of what is left out cannot be that of the store's index, or None."""
    path, first = store.folder / DROPPED_FILE, 0
    try:
        for dropped in read_dropped(store.folder):
            docs = dropped.doc
            if np.any(docs[1:] < docs[:-1]) or docs[0] < first or docs[-1] >= len(store):
                return f"{path} names documents that are not there, or not in their order: restore it"
            if problem := _problem_of(store, dropped, blocks(first, int(docs[-1]) + 1)):
                return f"{path} {problem}: restore it"
            first = int(docs[-1]) + 1
    except ValueError as error:
        return str(error)
    problem = _problem_of(store, dropped_of([]), blocks(first, len(store)))
    return f"{path} {problem}: restore it" if problem else None


def _problem_of(store: TokenStore, dropped: Dropped, documents: Iterator[slice]) -> str | None:
    for block in documents:
        rows = dropped.select(slice(*np.searchsorted(dropped.doc, [block.start, block.stop]).tolist()))
        left_out = np.zeros(block.stop - block.start, np.int64)
        np.add.at(left_out, rows.doc - block.start, rows.end - rows.begin)
        stays = store.lengths(block)
        for place in np.flatnonzero(store.stored_lengths(block) - left_out != stays)[:1].tolist():
            doc, tokens = block.start + place, int(left_out[place])
            if store.split(doc) is None and not tokens:
                return f"does not say why document {doc} is left out"
            return f"leaves out {tokens} tokens of document {doc}, of which the index says {stays[place]} stay"
    return None
