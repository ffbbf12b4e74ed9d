"""Statistics of a data set: what the manifest keeps of them, and the table that ends a build."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from data_prep.cut import KINDS
from data_prep.filters import MEASURES
from data_prep.ledger import Ledger, filtered_of
from data_prep.pack import RowCounts, total_of
from data_prep.records import Filtered, LeftOut, printable
from storage.manifest import LeftOutFiles, Manifest, SourceRows

ROW_STATISTICS = (
    *("rows", "row_tokens", "padding", "targets"),
    *("documents_cut", "documents_cut_though_fitting", "tokens_dropped"),
)
PERCENTILES = (1, 10, 50, 90, 99)
EXAMPLES = 5
NAMES_KEPT, NAMES_SHOWN = 100, 5


class StoredNumbers(NamedTuple):
    """Of the documents that stay, and what was found beside them."""

    lengths: np.ndarray
    """The numbers of tokens that occur, ascending, int64."""
    counts: np.ndarray
    """How many documents have each, int64."""
    bytes: int
    repeated_keys: int
    duplicates: int
    """Documents whose text an earlier one has, whether they are left out or not."""


def statistics(
    ledgers: list[Ledger],
    stored: StoredNumbers,
    removed: int,
    packings: dict[str, dict[str, RowCounts]],
    cuts: dict[str, Counter[str]],
) -> dict[str, Any]:
    """Counts over the whole input (`input`), over the documents that stay, and over the rows of each split.

    `removed`: how many of the exact duplicates are left out.
    """
    skipped: Counter[str] = Counter()
    for ledger in ledgers:
        skipped.update(ledger.skipped)
    documents, tokens = int(stored.counts.sum()), int((stored.lengths * stored.counts).sum())
    places = np.searchsorted(np.cumsum(stored.counts) * 100, np.array(PERCENTILES) * documents)
    return {
        "input": {
            "documents": sum(ledger.documents for ledger in ledgers),
            "empty": sum(ledger.empty for ledger in ledgers),
            "skipped": dict(sorted(skipped.items())),
            "skipped_examples": [example for ledger in ledgers for example in ledger.examples][:EXAMPLES],
            "repeated_keys": stored.repeated_keys,
            "duplicates": stored.duplicates,
            "duplicates_removed": removed,
            "tokens": sum(ledger.tokens for ledger in ledgers),
            "unknown_tokens": sum(ledger.unknown for ledger in ledgers),
            "byte_fallback_tokens": sum(ledger.fallback for ledger in ledgers),
        },
        "documents": documents,
        "bytes": stored.bytes,
        "tokens": tokens,
        "document_tokens": {
            "mean": round(tokens / documents, 2),
            **{f"p{p}": int(stored.lengths[place]) for p, place in zip(PERCENTILES, places, strict=True)},
            "max": int(stored.lengths[-1]),
        },
        "rows": {
            name: _row_statistics(list(sources.values())) | {"cuts": dict(cuts[name])}
            for name, sources in packings.items()
        },
    }


def _row_statistics(counts: list[RowCounts]) -> dict[str, int]:
    return {name: getattr(total_of(counts), name) for name in ROW_STATISTICS}


def target_statistics(splits: dict[str, dict[str, SourceRows]]) -> dict[str, Any]:
    """Tokens that carry loss, and their share of the documents' tokens, in all and by source."""
    sums: dict[str, list[int]] = {}
    for sources in splits.values():
        for name, entry in sources.items():
            for key in ("", name):
                targets, tokens = sums.get(key, (0, 0))
                sums[key] = [targets + entry.targets, tokens + entry.tokens]
    found = {name: {"tokens": targets, "share": round(targets / tokens, 6)} for name, (targets, tokens) in sums.items()}
    return found.pop("") | {"sources": found}


def by_reason(left_out: Iterable[LeftOut]) -> dict[str, LeftOutFiles]:
    """What of the input was not read, the reasons in alphabetical order; a file counts once, however many parts it lacks."""
    reasons: dict[str, dict[str, LeftOut]] = {}
    for entry in left_out:
        places = reasons.setdefault(entry.reason, {})
        before = places[entry.path].size if entry.path in places else 0
        places[entry.path] = entry._replace(size=before + entry.size)
    return {
        reason: LeftOutFiles(
            files=sum(entry.files for entry in places.values()),
            bytes=sum(entry.size for entry in places.values()),
            names=[printable(path) for path in list(places)[:NAMES_KEPT]],
        )
        for reason, places in sorted(reasons.items())
    }


def left_out_words(reasons: dict[str, LeftOutFiles]) -> Iterator[str]:
    """Such as "not read: 3 files (1.2 MB), hidden: notes/.a, notes/.b, ..."."""
    for reason, entry in reasons.items():
        names = ", ".join(entry.names[:NAMES_SHOWN]) + (", ..." if len(entry.names) > NAMES_SHOWN else "")
        yield f"not read: {entry.files:,} file{'s' * (entry.files != 1)} ({entry.bytes:,} bytes), {reason}: {names}"


def print_summary(manifest: Manifest, output: Path, seconds: float) -> None:
    """What a build made, in a few lines."""
    numbers: Any = manifest.statistics
    given, lengths = numbers["input"], numbers["document_tokens"]
    table = Table(title=f"{output} in {seconds:.1f} s", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    add = table.add_row
    add("documents", f"{numbers['documents']:,} ({numbers['bytes'] / 1e6:,.1f} MB of text)")
    add("tokens", f"{numbers['tokens']:,} ({numbers['bytes'] / numbers['tokens']:.3f} bytes a token)")
    add("tokens a document", "  ".join(f"{name} {value:,}" for name, value in lengths.items()))
    add(
        "unknown / byte fallback",
        f"{_share(given, 'unknown_tokens')} / {_share(given, 'byte_fallback_tokens')} of tokens",
    )
    removed = "removed" if given["duplicates_removed"] else "kept; --deduplicate, with another --output, removes them"
    add("exact duplicates", f"{given['duplicates']:,}" + (f" ({removed})" if given["duplicates"] else ""))
    for words in dropped_words(numbers):
        add("left out", words)
    if given["repeated_keys"]:
        add("repeated keys", f"{given['repeated_keys']:,}")
    add("left out", f"{given['empty']:,} empty" + "".join(f", {n:,} {why}" for why, n in given["skipped"].items()))
    for example in given["skipped_examples"]:
        add("", example)
    for words in left_out_words(manifest.left_out):
        add(*words.split(": ", 1))
    if manifest.target_spans:
        add("targets", target_words(numbers))
    for name, rows in numbers["rows"].items():
        cut = f"{rows['documents_cut']:,} documents cut ({rows['documents_cut_though_fitting']:,} that would fit)"
        dropped = f", {rows['tokens_dropped']:,} tokens dropped" if rows["tokens_dropped"] else ""
        padding = f"{100 * rows['padding'] / rows['row_tokens']:.3f} % padding"
        add(name, f"{rows['rows']:,} rows of {manifest.seq_length:,} + 1, {padding}, {cut}{dropped}")
        if rows["documents_cut"]:
            add("", cut_words(rows["cuts"]))
    if len(manifest.inputs) > 1:
        for name, source in manifest.splits["train"].items():
            weight = "" if source.weight is None else f", weight {source.weight:g}"
            carrying = f" ({source.targets:,} targets)" if manifest.target_spans else ""
            add(
                f"source {name}",
                f"{source.documents:,} documents, {source.tokens:,} tokens{carrying}, {source.rows:,} rows{weight}",
            )
    if manifest.repacked_from:
        add("packed again from", manifest.repacked_from)
    add("fingerprint", manifest.fingerprint)
    console = Console(highlight=False, markup=False, emoji=False)  # a name may look like either
    if console.is_terminal:
        console.print(table)
    else:
        print(_plain(table))


def filtered_statistics(tokens: Path) -> dict[str, Any]:
    """Documents of a finished store that filters left out, by filter, and for what has words for reasons by these."""
    counts = Counter(map(filtered_reason, filtered_of(tokens)))
    return dict(sorted(counts.items()))


def filtered_reason(entry: Filtered) -> str:
    """Such as "gopher-quality: gopher_short_doc"; of a measurement the filter alone."""
    measured = entry.filter.partition("=")[0] in MEASURES or entry.filter.startswith("language=")
    return f"{entry.filter}: {entry.reason}" if entry.reason and not measured else entry.filter


def dropped_words(numbers: dict[str, Any]) -> Iterator[str]:
    """Such as "12 x repeated section, of 9 documents: 3,456 tokens", and what filters left out."""
    for reason, count in numbers.get("filtered", {}).items():
        yield f"{count:,} documents by --filter {reason}"
    for reason, counts in numbers.get("dropped", {}).items():
        yield f"{counts['count']:,} x {reason}, of {counts['documents']:,} documents: {counts['tokens']:,} tokens"


def target_words(numbers: dict[str, Any]) -> str:
    """Such as "1,234 (21.7 % of all tokens), what the assistant writes; of a 20.0 %, of b 30.0 %"."""
    targets = numbers["targets"]
    shares = ", ".join(f"of {name} {100 * entry['share']:.1f} %" for name, entry in targets["sources"].items())
    by_source = f"; {shares}" if len(targets["sources"]) > 1 else ""
    share = f"{100 * targets['share']:.1f} % of all tokens"
    return f"{targets['tokens']:,} ({share}), what the assistant writes{by_source}"


def cut_words(cuts: dict[str, int]) -> str:
    """Such as "12 cuts: at the end 9 of a paragraph, 0 of a line, 2 of a sentence; 1 elsewhere"."""
    pauses = ", ".join(f"{cuts[kind]:,} of a {kind}" for kind in KINDS[:-1])
    return f"{sum(cuts.values()):,} cuts: at the end {pauses}; {cuts['hard']:,} elsewhere"


def _share(given: dict[str, Any], name: str) -> str:
    return f"{100 * given[name] / given['tokens']:.3f} %"


def _plain(table: Table) -> str:
    left, right = (list(column.cells) for column in table.columns)
    return "\n".join([str(table.title), *(f"  {a:<24} {b}" for a, b in zip(left, right, strict=True))])
