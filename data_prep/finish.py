"""The later steps of a build: from a complete token store to a data set.

index     decide what is left out (leave_out.py) and the split, by document order and hash only (index.py)
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

from console.progress import Progress, say
from data_prep.duplicates.near import WORK_FOLDER
from data_prep.index import Tokenized, index_store
from data_prep.leave_out import near_settings
from data_prep.pack import RowCounts, total_of
from data_prep.plan import TOKENS_FOLDER, PackingPlan
from data_prep.rows import DocumentGroup, RowJob, choose_rows, write_rows
from data_prep.store import SPLITS, TokenStore
from data_prep.summary import filtered_statistics, statistics, target_statistics
from data_prep.tokenizer import Tokenizer
from storage.documents import write_manifest
from storage.manifest import Manifest, SourceRows, token_dtype

ROWS_FOLDER = "rows.tmp"
FEW_ROWS, FEW_TARGETS = 4, 1000
"""Of a validation split; with fewer its loss says next to nothing."""


def finish(
    plan: PackingPlan, tokenizer: Tokenizer, tokenizer_file: Path, output: Path, made: Tokenized, workers: int = 1
) -> Manifest:
    """Index the output folder's token store, pack it in so many processes and write the manifest."""
    options = plan.options
    index = index_store(options, [source.name for source in plan.sources], tokenizer, made, output, workers)
    places = output, output / TOKENS_FOLDER, output / ROWS_FOLDER, tokenizer_file
    job = RowJob(*places, options.packing, options.seed, options.has_chats, plan.sha256)
    try:
        chosen, sums, cuts = _choose_rows(job, sum(ledger.tokens for ledger in made.ledgers), workers)
        _say_if_few(list(sums.get("validation", {}).values()))
        removed = index.numbers.duplicates if options.deduplicate else 0
        numbers = statistics(made.ledgers, index.numbers, removed, sums, cuts) | made.foreseen
        if near_settings(options, tokenizer) or options.decontaminate is not None:
            numbers["dropped"] = index.dropped
        if options.filters is not None:
            numbers["filtered"] = filtered_statistics(output / TOKENS_FOLDER)
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
