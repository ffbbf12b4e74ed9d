"""What is left out of a data set, in words (`python -m data_prep.inspect DATA --dropped`), and whether the list is right."""

from collections.abc import Iterator

import numpy as np

from data_prep.dropped import DROPPED_FILE, REASONS, Dropped, read_dropped
from data_prep.ledger import filtered_of
from data_prep.store import TokenStore
from data_prep.tokenizer import Tokenizer

SHOWN_TOKENS, SHOWN_CHARACTERS = 40, 70


def dropped_lines(store: TokenStore, tokenizer: Tokenizer) -> Iterator[str]:
    """A line a document, or stretch of one: which, why, and how its text begins."""
    for entry in filtered_of(store.folder):
        yield f"document of key {entry.key!r}, not stored: --filter {entry.filter} ({entry.reason})"
    dropped = read_dropped(store.folder)
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
    dropped = read_dropped(store.folder)
    for row in np.flatnonzero(dropped.doc == doc).tolist():
        yield reason_words(store, dropped, row)


def dropped_problem(store: TokenStore) -> str | None:
    """Why the list of what is left out cannot be that of the store's index, or None."""
    path = store.folder / DROPPED_FILE
    try:
        dropped = read_dropped(store.folder)
    except ValueError as error:
        return str(error)
    docs, row = np.unique(dropped.doc, return_inverse=True)
    if len(docs) and not 0 <= docs[0] <= docs[-1] < len(store):
        return f"{path} names documents that are not there: restore it"
    left_out = np.bincount(row, dropped.end - dropped.begin, minlength=len(docs)).astype(np.int64)
    for doc, tokens in zip(docs.tolist(), left_out.tolist(), strict=True):
        stays = 0 if store.split(doc) is None else store.length(doc)
        if len(store.stored_tokens(doc)) - tokens != stays:
            return (
                f"{path} leaves out {tokens} tokens of document {doc}, of which the index says {stays} stay: restore it"
            )
    if missing := sorted({doc for doc in range(len(store)) if store.split(doc) is None} - set(docs.tolist())):
        return f"{path} does not say why document {missing[0]} is left out: restore it"
    return None
