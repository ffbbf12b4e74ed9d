"""A data set as one HTML page that needs no network: `python -m tools.data_report DATA -o data.html`.

What it holds by split and source, how long its documents are, where they are cut, what was left out and why, which documents
have the most repetitions, what a token holds by source and script (of a part of the documents, evenly over all), and beginnings
of documents to read. Of a data set that `data_prep` has not made, what its manifest says.
"""

if __name__ == "__main__":
    from console.command import end_at_ctrl_c

    end_at_ctrl_c()

import html
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from console.command import CommandParser
from data_prep.cut import KINDS
from data_prep.dropped import REASONS, ordered, read_dropped
from data_prep.plan import TOKENS_FOLDER
from data_prep.store import SPLITS, TokenStore
from data_prep.tokenizer import open_tokenizer
from storage.manifest import Manifest, read_manifest
from tools.data_facts import Efficiency, Reader, SampleText, length_classes
from tools.page import details, framed, table, write_page

CLUSTERS, KEYS_SHOWN = 20, 5


def page(data: Path) -> str:
    """The whole page. Names and texts are escaped: a document cannot become markup or a script."""
    manifest = read_manifest(data)
    store = TokenStore.open(data / TOKENS_FOLDER) if (data / TOKENS_FOLDER).is_dir() else None
    sections = [("", _sources(manifest)), ("Rows and cuts", _cuts(manifest)), ("Left out", _left_out(manifest))]
    samples = ""
    if store is not None:
        reader = Reader(store, open_tokenizer(data / manifest.tokenizer.file))
        parts = {source: store.documents(SPLITS[0], source) for source in manifest.splits[SPLITS[0]]}
        sections.insert(1, ("Length of documents in tokens", _lengths(store, manifest)))
        efficiency = {source: reader.by_script(part) for source, part in parts.items()}
        sections.append(("Repeated most", _clusters(store)))
        sections.insert(2, ("What a token holds, by source and script", _efficiency(efficiency)))
        samples = "".join(_sample_section(source, reader.samples(part)) for source, part in parts.items())
    else:
        words = f"<p>{TOKENS_FOLDER}/ is gone: lengths, scripts and samples are those of its documents.</p>"
        sections.append(("", words))
    facts = manifest.model_dump(mode="json", exclude={"splits"})
    status = f"{manifest.seq_length:,} + 1 tokens a row, made {manifest.created_at}"
    shown = "".join(_section(name, content) for name, content in sections if content)
    listed = details("statistics", facts.pop("statistics")) + details("manifest", facts)
    body = f"{shown}\n{samples}\n{listed}\n"
    return framed(data.resolve().name, status, _head(manifest), _tiles(manifest), body)


def _section(name: str, content: str) -> str:
    return f"<section>{f'<h2>{html.escape(name)}</h2>' if name else ''}{content}</section>"


def _head(manifest: Manifest) -> list[tuple[str, str]]:
    tokenizer, packing = manifest.tokenizer, manifest.packing
    cut = f", cut at {packing.cut}" if packing.cut != "exact" else ""
    return [
        ("tokenizer", f"{tokenizer.type}, {tokenizer.vocab_size:,} entries, ids as {manifest.dtype}"),
        ("packing", f"{packing.policy}, overlap {packing.overlap}{cut}"),
        ("fingerprint", manifest.fingerprint[:16]),
    ]


def _tiles(manifest: Manifest) -> list[tuple[str, str]]:
    numbers: Any = manifest.statistics
    entries = {split: list(sources.values()) for split, sources in manifest.splits.items()}
    documents, tokens, size = (
        sum(getattr(entry, name) for of_split in entries.values() for entry in of_split)
        for name in ("documents", "tokens", "bytes")
    )
    tiles = [
        ("documents", f"{documents:,}"),
        ("tokens", f"{tokens:,}"),
        ("text", f"{size / 1e6:,.1f} MB"),
        ("bytes a token", f"{size / max(1, tokens):.3f}"),
        *((f"{split} rows", f"{sum(entry.rows for entry in of_split):,}") for split, of_split in entries.items()),
    ]
    if rows := numbers.get("rows"):
        padding = sum(split["padding"] for split in rows.values()) / max(1, sum(s["row_tokens"] for s in rows.values()))
        tiles.append(("padding", f"{padding:.3%}"))
    if given := numbers.get("input"):
        tiles.append(("exact duplicates", f"{given['duplicates']:,}"))
    if "targets" in numbers:
        tiles.append(("carry loss", f"{numbers['targets']['share']:.1%}"))
    return tiles


def _sources(manifest: Manifest) -> str:
    """What each source gives to each split."""
    head = ["split", "source", "documents", "tokens", "MB of text", "bytes a token", "rows", "targets", "weight"]
    rows, shares = [], []
    total = sum(entry.tokens for sources in manifest.splits.values() for entry in sources.values())
    for split, sources in manifest.splits.items():
        for name, entry in sorted(sources.items()):
            counts = (f"{entry.documents:,}", f"{entry.tokens:,}", f"{entry.bytes / 1e6:,.1f}")
            weight = "by rows" if entry.weight is None else f"{entry.weight:g}"
            efficiency = f"{entry.bytes / max(1, entry.tokens):.2f}"
            rows.append([split, name, *counts, efficiency, f"{entry.rows:,}", f"{entry.targets:,}", weight])
            shares.append(entry.tokens / max(1, total))
    return table(head, rows, shares)


def _lengths(store: TokenStore, manifest: Manifest) -> str:
    kept = np.concatenate([store.documents(split).length for split in manifest.splits])
    classes = length_classes(kept)
    rows = [
        [f"{least:,} to {most:,}", f"{documents:,}", f"{tokens:,}", f"{tokens / max(1, kept.sum()):.1%}"]
        for least, most, documents, tokens in classes
    ]
    lengths: Any = manifest.statistics.get("document_tokens", {})
    words = ", ".join(f"{name} {value:,}" for name, value in lengths.items())
    most_documents = max((documents for *_, documents, _ in classes), default=1)
    bars = [documents / most_documents for *_, documents, _ in classes]
    head = ["tokens", "documents", "tokens in all", "share of tokens"]
    return f"<p>{html.escape(words)}</p>{table(head, rows, bars)}"


def _efficiency(sources: dict[str, dict[str, Efficiency]]) -> str:
    head = ["source", "script", "share of tokens", "bytes a token", "characters a token", "single bytes"]
    rows, shares = [], []
    for source, scripts in sources.items():
        total = sum(entry.tokens for entry in scripts.values())
        for script, entry in scripts.items():
            share = entry.tokens / total
            held = (f"{entry.bytes / entry.tokens:.2f}", f"{entry.characters / entry.tokens:.2f}")
            rows.append([source, script, f"{share:.2%}", *held, f"{entry.fallback / entry.tokens:.2%}"])
            shares.append(share)
    return table(head, rows, shares)


def _cuts(manifest: Manifest) -> str:
    numbers: Any = manifest.statistics
    kinds = [*KINDS[:-1], "elsewhere"]
    head = ["split", "rows", "padding", "documents cut", "that would fit", *(f"cuts: {kind}" for kind in kinds)]
    rows = []
    for split, counts in numbers.get("rows", {}).items():
        padding = f"{counts['padding'] / max(1, counts['row_tokens']):.3%}"
        cut = (f"{counts['documents_cut']:,}", f"{counts['documents_cut_though_fitting']:,}")
        cuts = (f"{counts.get('cuts', {}).get(kind, 0):,}" for kind in KINDS)
        rows.append([split, f"{counts['rows']:,}", padding, *cut, *cuts])
    return table(head, rows) if rows else ""


def _left_out(manifest: Manifest) -> str:
    """Records, documents and files of the input that are not in the data set, by reason."""
    numbers: Any = manifest.statistics
    given = numbers.get("input")
    if given is None:
        return ""
    rows = [["empty documents", f"{given['empty']:,}", ""]]
    rows += [[reason, f"{count:,}", ""] for reason, count in given["skipped"].items()]
    removed = "all but the first removed" if given["duplicates_removed"] else "kept"
    rows.append(["exact duplicates", f"{given['duplicates']:,}", removed])
    for reason, dropped in numbers.get("dropped", {}).items():
        words = f"of {dropped['documents']:,} documents, {dropped['tokens']:,} tokens"
        rows.append([reason, f"{dropped['count']:,}", words])
    if given["repeated_keys"]:
        rows.append(["repeated keys", f"{given['repeated_keys']:,}", "kept"])
    for reason, entry in manifest.left_out.items():
        rows.append([f"files: {reason}", f"{entry.files:,}", f"{entry.bytes:,} bytes"])
    return table(["reason", "count", ""], rows)


def _clusters(store: TokenStore) -> str:
    """The documents that most of what is left out, documents and sections, is a repetition of."""
    originals, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for piece in read_dropped(store.folder):
        found, times = np.unique(piece.of[piece.of >= 0], return_counts=True)
        originals, place = np.unique(np.concatenate([originals, found]), return_inverse=True)
        counts = np.bincount(place, np.concatenate([counts, times]), len(originals)).astype(np.int64)
    shown = originals[np.argsort(-counts, kind="stable")[:CLUSTERS]]
    pieces = [piece.select(np.isin(piece.of, shown)) for piece in read_dropped(store.folder)]
    rows = []
    for original in shown.tolist():
        mine = ordered([piece.select(piece.of == original) for piece in pieces])
        of_reason = np.bincount(mine.reason, minlength=len(REASONS)).tolist()
        what = ", ".join(f"{count:,} x {reason}" for count, reason in zip(of_reason, REASONS, strict=True) if count)
        keys = [store.key(int(doc)) for doc in np.unique(mine.doc)[: KEYS_SHOWN + 1]]
        names = ", ".join(keys[:KEYS_SHOWN]) + (", ..." if len(keys) > KEYS_SHOWN else "")
        similar = f"{mine.value.min():.3f} to {mine.value.max():.3f}"
        rows.append([store.key(original), what, similar, names])
    return table(["document", "left out elsewhere", "similarity", "of"], rows) if rows else ""


def _sample_section(source: str, samples: list[SampleText]) -> str:
    if not samples:
        return ""
    return _section(f"Documents of {source}", "".join(_sample(sample) for sample in samples))


def _sample(sample: SampleText) -> str:
    what = f"{sample.key}, {sample.tokens:,} tokens" + ("" if sample.is_whole else ", its beginning")
    look = 'class="sample code" dir="ltr" tabindex="0"' if sample.is_code else 'class="sample" dir="auto"'
    return f"<p>{html.escape(what)}</p><div {look}>{html.escape(sample.text)}</div>"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = CommandParser(prog="python -m tools.data_report", description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, metavar="DATA", help="folder made by data_prep.build")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="page to write (default: DATA/data.html)")
    options = parser.parse_args(arguments)
    output = options.output or options.data / "data.html"
    return write_page("tools.data_report", output, lambda: page(options.data))


if __name__ == "__main__":
    sys.exit(main())
