"""Look into a prepared data set: what it holds, one of its rows as text, or one of its documents.

    python -m data_prep.inspect DATA
    python -m data_prep.inspect DATA --row N [--split train] [--source NAME]
    python -m data_prep.inspect DATA --document KEY_OR_N
    python -m data_prep.inspect DATA --dropped

A row is shown piece by piece, with the document each was cut from; overlap context, which carries no loss, is dimmed (on
a terminal) or put in ⟦ ⟧. Of conversations, what carries loss is green or put in ⟪ ⟫, and control tokens are spelled out.
Rows are counted from 0, over all sources in the order of their names or within --source. Every cut is shown with its kind
(data_prep/cut.py) and the text on both sides, line ends as ⏎. --dropped lists what is left out, why and of which document
it has the text, a line each.
"""

if __name__ == "__main__":
    from console.command import end_at_ctrl_c

    end_at_ctrl_c()

import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from console.command import CommandParser, run_command
from data_prep.cut import Breaks
from data_prep.dropped_report import dropped_lines, reasons_of
from data_prep.store import TokenStore
from data_prep.summary import cut_words, dropped_words, left_out_words, target_words
from data_prep.token_bytes import token_bytes
from data_prep.tokenizer import Tokenizer, open_tokenizer
from storage.documents import pieces_of
from storage.manifest import Manifest, read_manifest
from storage.shards import ShardedDataset, open_split

CUT_TOKENS = 16
"""Tokens shown on each side of a cut."""

console = Console(
    soft_wrap=True, highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 140
)


def show_overview(directory: Path, manifest: Manifest) -> None:
    """Print what the data set holds, and how it was made."""
    table = Table(
        "split", "source", title=f"{directory}: rows of {manifest.seq_length:,} + 1 tokens", title_justify="left"
    )
    for name in ("documents", "tokens", "bytes", "rows", "weight", "shards"):
        table.add_column(name, justify="right")
    for split, sources in manifest.splits.items():
        for name, entry in sorted(sources.items()):
            counts = (f"{n:,}" for n in (entry.documents, entry.tokens, entry.bytes, entry.rows))
            weight = "by rows" if entry.weight is None else f"{entry.weight:g}"
            table.add_row(split, name, *counts, weight, str(len(entry.shards)))
    console.print(table)
    policy, tokenizer = manifest.packing, manifest.tokenizer
    cut = f"structure within {policy.cut_tolerance:g} of a row" if policy.cut == "structure" else policy.cut
    console.print(
        f"packing      {policy.policy}, overlap {policy.overlap}, cut {cut}, tail {policy.tail}, seed {manifest.seed}"
    )
    statistics: dict[str, Any] = manifest.statistics
    for split, rows in statistics.get("rows", {}).items():
        console.print(f"padding      {rows['padding'] / rows['row_tokens']:.3%} of {split}")
        if any(rows.get("cuts", {}).values()):
            console.print(f"             {cut_words(rows['cuts'])}")
    if manifest.target_spans:
        console.print(f"targets      {target_words(statistics)}")
    for words in dropped_words(statistics):
        console.print(f"left out     {words} (--dropped lists them)")
    for words in left_out_words(manifest.left_out):
        console.print(words.replace(": ", "     ", 1))
    console.print(f"tokenizer    {tokenizer.type}, {tokenizer.vocab_size:,} entries, ids as {manifest.dtype}")
    again = f", from the token store of {manifest.repacked_from}" if manifest.repacked_from else ""
    console.print(f"created      {manifest.created_at}{again}")
    console.print(f"fingerprint  {manifest.fingerprint}")


def show_row(directory: Path, split: str, source: str | None, number: int) -> None:
    """Print a row piece by piece; without `source` the number counts the rows of the split."""
    dataset = open_split(directory, split)
    if source is not None and source not in dataset.rows_per_source:
        raise ValueError(f"split {split} has no source {source!r}: it has {', '.join(dataset.sources)}")
    rows = len(dataset) if source is None else dataset.rows_per_source[source]
    if not 0 <= number < rows:
        raise ValueError(f"there is no row {number}: {source or f'split {split}'} has {rows} rows, counted from 0")
    if source is None:
        source, number = dataset.place(number)
    tokenizer, store = open_tokenizer(directory / dataset.manifest.tokenizer.file), _store(directory)
    breaks = Breaks(token_bytes(tokenizer))
    row, spans = dataset.row(source, number), dataset.spans(source, number)
    console.print(Text(f"row {number} of source {source}, split {split}: {len(row.ids):,} tokens", "bold"))
    begin = 0
    for length, context, doc, offset in zip(*(column.tolist() for column in row[1:]), strict=True):
        place = f"tokens {begin:,}-{begin + length - 1:,}: {_document(store, doc)}, its tokens {offset:,}-{offset + length - 1:,}"
        place += f" of {len(store.tokens(doc)):,}" if store else ""
        place += f", the first {context:,} of them context" if context else ""
        console.print(Text(place, "cyan"))
        if store and offset and offset + context < len(store.tokens(doc)):
            console.print(_place_of_cut(store.tokens(doc), offset + context, breaks))
        ids = row.ids[begin : begin + length]
        if spans is None:
            console.print(_text(tokenizer, ids, context))
        else:
            console.print(_chat(tokenizer, breaks, ids, spans - begin, context))
        if store and offset + length < len(store.tokens(doc)):
            console.print(_place_of_cut(store.tokens(doc), offset + length, breaks))
        begin += length
    if begin < len(row.ids):
        console.print(Text(f"tokens {begin:,}-{len(row.ids) - 1:,}: padding", "cyan"))


def show_document(directory: Path, manifest: Manifest, wanted: str) -> None:
    """Print a document and the rows that hold it; `wanted` is its number or its key."""
    store = _store(directory)
    if store is None:
        raise ValueError(f"{directory / 'tokens'} is gone, so documents cannot be shown (rows can: --row N)")
    known = wanted.isdecimal() and int(wanted) < len(store)
    number = int(wanted) if known else store.find(wanted)
    if number is None:
        raise ValueError(
            f"{directory} has no document with the key {wanted!r}, and its documents are numbered 0 to {len(store) - 1}"
        )
    split, source, ids = store.split(number), store.source(number), store.tokens(number)
    tokenizer = open_tokenizer(directory / manifest.tokenizer.file)
    breaks = Breaks(token_bytes(tokenizer))
    console.print(Text(f"{_document(store, number)}, source {source}, {len(ids):,} tokens", "bold"))
    for words in reasons_of(store, number):
        console.print(Text(words, "cyan"))
    if split is None:
        console.print(Text("it is in no row", "cyan"))
    elif split in manifest.splits:
        for row, offset, length in pieces_of(ShardedDataset(directory, split, manifest), source, number):
            where = f"tokens {offset:,}-{offset + length - 1:,} in row {row} of source {source}, split {split}"
            console.print(Text(where, "cyan"))
            if offset + length < len(ids):
                console.print(_place_of_cut(ids, offset + length, breaks))
    if manifest.target_spans:
        spans, _ = store.targets(np.array([number]))
        console.print(_chat(tokenizer, breaks, ids, np.stack([spans.begin, spans.end], axis=1)))
    else:
        console.print(Text(tokenizer.decode(ids)))


def show_dropped(directory: Path, manifest: Manifest) -> None:
    """Print a line for every document, and stretch of one, that is left out."""
    store = _store(directory)
    if store is None:
        raise ValueError(f"{directory / 'tokens'} is gone, and with it the list of what was left out")
    for words in dropped_lines(store, open_tokenizer(directory / manifest.tokenizer.file)):
        print(words)


def _store(directory: Path) -> TokenStore | None:
    return TokenStore.open(directory / "tokens") if (directory / "tokens").is_dir() else None


def _document(store: TokenStore | None, number: int) -> str:
    return f"document {number}" + (f", key {store.key(number)!r}" if store else "")


def _place_of_cut(ids: np.ndarray, position: int, breaks: Breaks) -> Text:
    """Such as "cut before token 4,096 (paragraph): …the end.⏎⏎ ✂ And then…"."""
    sides = ids[max(0, position - CUT_TOKENS) : position], ids[position : position + CUT_TOKENS]
    before, after = (b"".join(breaks.pieces[i] for i in side).decode(errors="replace") for side in sides)
    words = f"cut before token {position:,} ({breaks.kind(ids, position)}): …{before} ✂ {after}…"
    return Text(words.replace("\r", "").replace("\n", "⏎"), "yellow")


def _text(tokenizer: Tokenizer, ids: np.ndarray, context: int) -> Text:
    whole, before = tokenizer.decode(ids), tokenizer.decode(ids[:context]) if context else ""
    if not before or not whole.startswith(before):  # a character may be cut between the two
        return Text(whole)
    dimmed = Text(before, "dim") if console.is_terminal else Text(f"⟦{before}⟧")
    return dimmed + Text(whole[len(before) :])


def _chat(tokenizer: Tokenizer, breaks: Breaks, ids: np.ndarray, spans: np.ndarray, context: int = 0) -> Text:
    """The text of a part of a conversation; `spans` [spans, 2] of its tokens carry loss."""
    looks = [(None, "", ""), ("dim", "⟦", "⟧"), ("bold green", "⟪", "⟫")]
    kinds = np.zeros(len(ids), np.int64)
    kinds[:context] = 1
    for begin, end in spans.tolist():
        kinds[max(begin, 0) : max(end, 0)] = 2
    vocabulary = tokenizer.vocabulary()
    control = {vocabulary[token]: token.encode() for token in tokenizer.control_strings if token in vocabulary}
    shown = Text()
    for run in np.split(np.arange(len(ids)), np.flatnonzero(np.diff(kinds)) + 1):
        style, opening, closing = looks[kinds[run[0]]]
        text = b"".join(control.get(i) or breaks.pieces[i] for i in ids[run].tolist()).decode(errors="replace")
        shown += Text(text, style or "") if console.is_terminal else Text(f"{opening}{text}{closing}")
    return shown


def main() -> None:
    parser = CommandParser(prog="python -m data_prep.inspect", description=__doc__)
    parser.add_argument("data", type=Path, help="folder made by data_prep.build")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--row", type=int, metavar="N", help="show this row (default: an overview)")
    what.add_argument("--document", metavar="KEY_OR_N", help="show the document with this number or else this key")
    what.add_argument("--dropped", action="store_true", help="list what was left out of the documents, and why")
    parser.add_argument("--split", default="train", help="split of --row (default: %(default)s)")
    parser.add_argument("--source", help="source of --row (default: rows are counted over all sources)")
    arguments = parser.parse_args()
    manifest = read_manifest(arguments.data)
    if arguments.row is not None:
        show_row(arguments.data, arguments.split, arguments.source, arguments.row)
    elif arguments.dropped:
        show_dropped(arguments.data, manifest)
    elif arguments.document is not None:
        show_document(arguments.data, manifest, arguments.document)
    else:
        show_overview(arguments.data, manifest)


if __name__ == "__main__":
    run_command(main)
