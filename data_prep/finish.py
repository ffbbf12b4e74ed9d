"""The later steps of a build: from a complete token store to a data set.

index     decide what is left out (leave_out.py) and the split, by document order and hash only
choose    per split and source, documents to windows (cut.py), windows to rows (pack.py)
write     rows to shards (storage/shards.py)
manifest  last; without it the folder is not a data set
"""

import datetime
import hashlib
import importlib.metadata
import shutil
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import JsonValue

from console.progress import Progress, say
from data_prep.dropped import Dropped, write_dropped
from data_prep.duplicates.contamination import CONTAMINATED
from data_prep.duplicates.near import WORK_FOLDER
from data_prep.leave_out import (
    dropped_statistics,
    find_contaminated,
    find_dropped,
    merged,
    near_settings,
    without,
)
from data_prep.ledger import Ledger
from data_prep.pack import RowCounts, total_of
from data_prep.plan import TOKENS_FOLDER, PackingPlan
from data_prep.rows import DocumentGroup, RowJob, choose_rows, write_rows
from data_prep.sources import key_prefix
from data_prep.store import LEFT_OUT, SPLITS, Columns, TokenStore, read_columns, write_index
from data_prep.summary import filtered_statistics, statistics, target_statistics
from data_prep.tokenizer import Tokenizer
from storage.documents import write_manifest
from storage.manifest import LeftOutFiles, Manifest, SourceRows, token_dtype

ROWS_FOLDER = "rows.tmp"
FEW_ROWS, FEW_TARGETS = 4, 1000
"""Of a validation split; with fewer its loss says next to nothing."""


class Tokenized(NamedTuple):
    """What is known of the complete token store in an output folder."""

    ledgers: list[Ledger]
    unit_sources: list[int]
    inputs: dict[str, str]
    created_by: dict[str, str]
    left_out: dict[str, LeftOutFiles]
    foreseen: dict[str, JsonValue]
    """What an export of the tokenizer will not keep as it is (data_prep/foresee.py)."""
    repacked_from: str | None = None
    dropped: Dropped | None = None
    """What is left out, where that was decided before."""


def finish(
    plan: PackingPlan, tokenizer: Tokenizer, tokenizer_file: Path, output: Path, made: Tokenized, workers: int = 1
) -> Manifest:
    """Index the output folder's token store, pack it in so many processes and write the manifest."""
    columns, split, duplicates, dropped = _index(plan, tokenizer, made, output, workers)
    places = output, output / TOKENS_FOLDER, output / ROWS_FOLDER, tokenizer_file
    job = RowJob(*places, plan.options.packing, plan.options.seed, plan.options.has_chats, plan.sha256)
    try:
        chosen, sums, cuts = _choose_rows(job, sum(ledger.tokens for ledger in made.ledgers), workers)
        _say_if_few(list(sums.get("validation", {}).values()))
        removed = len(duplicates) if plan.options.deduplicate else 0
        numbers = statistics(made.ledgers, columns, split, duplicates, removed, sums, cuts) | made.foreseen
        if near_settings(plan.options, tokenizer) or plan.options.decontaminate is not None:
            numbers["dropped"] = dropped_statistics(dropped)
        if plan.options.filters is not None:
            numbers["filtered"] = filtered_statistics(made.ledgers)
        del columns, split, duplicates, dropped
        splits = _write_rows(plan, job, chosen, sums, workers)
    finally:
        shutil.rmtree(job.scratch, ignore_errors=True)
    if plan.options.has_chats:
        numbers["targets"] = target_statistics(splits)
    manifest = Manifest(
        created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        created_by=made.created_by | {"pyarrow": importlib.metadata.version("pyarrow")},
        repacked_from=made.repacked_from,
        inputs=made.inputs,
        tokenizer=tokenizer.info(tokenizer_file.relative_to(output).as_posix()),
        tokenizer_files=_hashes(tokenizer_file, output),
        dtype=token_dtype(tokenizer.vocab_size),
        packing=plan.options.packing,
        target_spans=plan.options.has_chats,
        seed=plan.options.seed,
        splits=splits,
        statistics=numbers,
        left_out=made.left_out,
    )
    shutil.rmtree(output / WORK_FOLDER, ignore_errors=True)
    return write_manifest(output, manifest)


def _hashes(tokenizer_file: Path, output: Path) -> dict[str, str]:
    """Of the files beside the tokenizer's own."""
    beside = (file for file in sorted(tokenizer_file.parent.rglob("*")) if file.is_file() and file != tokenizer_file)
    return {file.relative_to(output).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in beside}


def _index(
    plan: PackingPlan, tokenizer: Tokenizer, made: Tokenized, output: Path, workers: int
) -> tuple[Columns, np.ndarray, np.ndarray, Dropped]:
    """Decide what is left out and every document's split (a position in SPLITS, or LEFT_OUT); write the store's index."""
    tokens = output / TOKENS_FOLDER
    columns, names = read_columns(tokens, made.unit_sources, [source.name for source in plan.sources])
    duplicates, originals = find_duplicates(columns)
    options, lengths, decided = plan.options, columns.length, made.dropped
    if decided is None:
        dropped = find_dropped(options, tokenizer, output, made.ledgers, columns, (duplicates, originals), workers)
    else:
        dropped = decided.select(decided.reason != CONTAMINATED)
    split = np.where(columns.key_hash < np.uint64(int(plan.options.validation_fraction * 2**64)), 1, 0).astype(np.uint8)
    split[dropped.doc[dropped.whole(columns.length)]] = LEFT_OUT
    if not np.any(split != LEFT_OUT):
        filtered = sum(len(ledger.filtered) for ledger in made.ledgers)
        words = f", {filtered} left out by --filter" if filtered else ""
        raise ValueError(
            f"the input holds no text: {sum(ledger.empty for ledger in made.ledgers)} empty documents{words}"
        )
    if plan.options.validation_fraction > 0:
        _fill_validation(columns, split, names)
    if options.decontaminate is not None:
        if decided is None:
            contaminated = find_contaminated(options, tokenizer, output, made.ledgers, split, dropped, workers)
        else:
            contaminated = decided.select(decided.reason == CONTAMINATED)
        dropped = merged(dropped, contaminated, lengths)
        split[contaminated.doc[contaminated.whole(lengths)]] = LEFT_OUT
        if not np.any(split == 0):
            raise ValueError(f"--decontaminate {options.decontaminate} leaves no document for training")
    columns = without(columns, dropped)
    write_dropped(tokens, dropped)
    prefixes = [key_prefix(plan.options.seed, source.name) for source in plan.sources]
    write_index(tokens, columns, split, [ledger.documents for ledger in made.ledgers], names, prefixes)
    return columns, split, duplicates, dropped


def find_duplicates(columns: Columns) -> tuple[np.ndarray, np.ndarray]:
    """Documents whose text an earlier document has (equal 128-bit hashes and equal sizes), and the first that has it."""
    order = np.lexsort((columns.text_hash[:, 1], columns.text_hash[:, 0]))  # stable: document order within equals
    same = np.all(columns.text_hash[order[1:]] == columns.text_hash[order[:-1]], axis=1)
    same &= columns.nbytes[order[1:]] == columns.nbytes[order[:-1]]
    first = np.maximum.accumulate(np.where(np.append(True, ~same), np.arange(len(order)), 0)) if len(order) else order
    duplicates, originals = order[1:][same], order[first[1:]][same]
    by_number = np.argsort(duplicates)
    return duplicates[by_number], originals[by_number]


def _fill_validation(columns: Columns, split: np.ndarray, names: list[str]) -> None:
    """A source of few documents may have none with a small enough hash: its smallest one is taken, and said."""
    for number, name in enumerate(names):
        mine = np.flatnonzero((columns.source == number) & (split != LEFT_OUT))
        for wanted, pick in ((1, np.argmin), (0, np.argmax)):
            if len(mine) >= 2 and not np.any(split[mine] == wanted):
                split[mine[pick(columns.key_hash[mine])]] = wanted
                say(f"{name}: one of its {len(mine)} documents was put into {SPLITS[wanted]}, which had none by hash")
    for wanted, words in ((1, "validation; --validation-fraction 0 does without"), (0, "training")):
        if not np.any(split == wanted):
            raise ValueError(f"{len(split)} document(s) leave none for {words}")


def _choose_rows(
    job: RowJob, tokens: int, workers: int
) -> tuple[list[tuple[DocumentGroup, RowCounts]], dict[str, dict[str, RowCounts]], dict[str, Counter[str]]]:
    """The groups of rows; their sums by split and source; by split the cuts of each kind."""
    chosen: list[tuple[DocumentGroup, RowCounts]] = []
    cuts: dict[str, Counter[str]] = {}
    with Progress("cutting", tokens) as progress:
        for group, counts, kinds in choose_rows(job, workers, progress.advance):
            chosen.append((group, counts))
            cuts.setdefault(group.split, Counter()).update(kinds)
    sums: dict[str, dict[str, RowCounts]] = {}
    for (split, source), parts in groupby(chosen, lambda pair: pair[0][:2]):
        mine = total_of([counts for _, counts in parts])
        if not mine.rows:
            raise ValueError(
                f"{source}: its {mine.tokens} tokens for {split} do not fill one row of "
                f"{job.policy.row_tokens}: use --tail pad or a smaller --seq-length"
            )
        sums.setdefault(split, {})[source] = mine
    return chosen, sums, cuts


def _say_if_few(validation: list[RowCounts]) -> None:
    """That a loss over so little text says next to nothing, while the data can still be built otherwise."""
    rows, targets = total_of(validation).rows, total_of(validation).targets
    if rows and (rows < FEW_ROWS or targets < FEW_TARGETS):
        say(
            f"validation has {rows:,} {'row' if rows == 1 else 'rows'} with {targets:,} targets: its loss will be noise; build "
            "with more documents or a larger --validation-fraction, into another --output"
        )


def _write_rows(
    plan: PackingPlan,
    job: RowJob,
    chosen: list[tuple[DocumentGroup, RowCounts]],
    sums: dict[str, dict[str, RowCounts]],
    workers: int,
) -> dict[str, dict[str, SourceRows]]:
    weights = {source.name: source.weight for source in plan.sources}
    for split in SPLITS:
        shutil.rmtree(job.output / split, ignore_errors=True)
    row_bytes = job.policy.row_tokens * TokenStore.open(job.tokens).dtype.itemsize
    with Progress("packing", sum(counts.rows for _, counts in chosen) * row_bytes) as progress:
        shards = write_rows(job, chosen, workers, lambda rows: progress.advance(rows * row_bytes))
    return {
        split: {
            source: SourceRows(
                documents=counts.documents,
                bytes=counts.bytes,
                tokens=counts.tokens,
                rows=counts.rows,
                targets=counts.targets,
                target_bytes=counts.target_bytes if job.targets else None,
                weight=weights.get(source),
                shards=shards[split, source],
            )
            for source, counts in sources.items()
        }
        for split, sources in sums.items()
    }
