"""The later steps of a build: from a complete token store to a data set.

index     decide duplicates and the split, by document order and hash only
choose    per split and source, documents to windows (cut.py), windows to rows (pack.py)
write     rows to shards (storage/shards.py)
manifest  last; without it the folder is not a data set
"""

import datetime
import hashlib
import importlib.metadata
import shutil
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import JsonValue

from console.progress import Progress, say
from data_prep.cut import Breaks, count_cuts, structure_windows
from data_prep.ledger import Ledger
from data_prep.pack import Packing, pack, write_split
from data_prep.plan import TOKENS_FOLDER, PackingPlan
from data_prep.sources import key_prefix
from data_prep.store import LEFT_OUT, SPLITS, Columns, TokenStore, read_columns, write_index
from data_prep.summary import statistics, target_statistics
from data_prep.token_bytes import token_bytes
from data_prep.tokenizer import Tokenizer
from storage.documents import write_manifest
from storage.manifest import LeftOutFiles, Manifest, SourceRows, token_dtype
from storage.shards import ShardWriter

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


def finish(plan: PackingPlan, tokenizer: Tokenizer, tokenizer_file: Path, output: Path, made: Tokenized) -> Manifest:
    """Index the output folder's token store, pack it and write the manifest."""
    columns, split, duplicates = _index(plan, made, output / TOKENS_FOLDER)
    packings, cuts = _choose_rows(plan, tokenizer, output)
    _say_if_few(list(packings.get("validation", {}).values()))
    numbers = statistics(made.ledgers, columns, split, duplicates, packings, cuts) | made.foreseen
    splits = _write_rows(plan, tokenizer, output, packings)
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
    return write_manifest(output, manifest)


def _hashes(tokenizer_file: Path, output: Path) -> dict[str, str]:
    """Of the files beside the tokenizer's own."""
    beside = (file for file in sorted(tokenizer_file.parent.rglob("*")) if file.is_file() and file != tokenizer_file)
    return {file.relative_to(output).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in beside}


def _index(plan: PackingPlan, made: Tokenized, tokens: Path) -> tuple[Columns, np.ndarray, np.ndarray]:
    """Decide every document's split (a position in SPLITS, or LEFT_OUT) and write the store's index."""
    columns, names = read_columns(tokens, made.unit_sources, [source.name for source in plan.sources])
    duplicates = find_duplicates(columns)
    split = np.where(columns.key_hash < np.uint64(int(plan.options.validation_fraction * 2**64)), 1, 0).astype(np.uint8)
    if plan.options.deduplicate:
        split[duplicates] = LEFT_OUT
    if not np.any(split != LEFT_OUT):
        raise ValueError(f"the input holds no text: {sum(ledger.empty for ledger in made.ledgers)} empty documents")
    if plan.options.validation_fraction > 0:
        _fill_validation(columns, split, names)
    prefixes = [key_prefix(plan.options.seed, source.name) for source in plan.sources]
    write_index(tokens, columns, split, [ledger.documents for ledger in made.ledgers], names, prefixes)
    return columns, split, duplicates


def find_duplicates(columns: Columns) -> np.ndarray:
    """Positions of documents whose text an earlier document has (equal 128-bit hashes and equal sizes)."""
    order = np.lexsort((columns.text_hash[:, 1], columns.text_hash[:, 0]))  # stable: document order within equals
    same = np.all(columns.text_hash[order[1:]] == columns.text_hash[order[:-1]], axis=1)
    same &= columns.nbytes[order[1:]] == columns.nbytes[order[:-1]]
    return np.sort(order[1:][same])


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
    plan: PackingPlan, tokenizer: Tokenizer, output: Path
) -> tuple[dict[str, dict[str, Packing]], dict[str, Counter[str]]]:
    """By split and source what each row will hold; by split the cuts of each kind."""
    store, policy = TokenStore.open(output / TOKENS_FOLDER), plan.options.packing
    breaks = Breaks(token_bytes(tokenizer))
    packings: dict[str, dict[str, Packing]] = {}
    cuts: dict[str, Counter[str]] = {}
    parts = {(split, source): store.documents(split, source) for split in SPLITS for source in store.sources}
    longer = sum(int(part.length[part.length > policy.row_tokens].sum()) for part in parts.values())
    with Progress("cutting", longer * store.dtype.itemsize * (1 + (policy.cut == "structure"))) as progress:

        def advance(tokens: int) -> None:
            progress.advance(tokens * store.dtype.itemsize)

        for (split, source), documents in parts.items():
            if not len(documents):
                continue
            windows = structure_windows(documents, policy, breaks, advance) if policy.cut == "structure" else None
            packing = pack(documents.length, policy.row_tokens, policy, plan.options.seed, windows)
            if plan.options.has_chats:
                packing = packing.with_targets(documents.targets()[0])
            if not packing.rows:
                raise ValueError(
                    f"{source}: its {int(documents.length.sum())} tokens for {split} do not fill one row of "
                    f"{policy.row_tokens}: use --tail pad or a smaller --seq-length"
                )
            ends = packing.piece_off + packing.piece_len
            cuts.setdefault(split, Counter()).update(count_cuts(documents, packing.piece_doc, ends, breaks, advance))
            packings.setdefault(split, {})[source] = packing
    return packings, cuts


def _say_if_few(validation: list[Packing]) -> None:
    """That a loss over so little text says next to nothing, while the data can still be built otherwise."""
    rows, targets = sum(packing.rows for packing in validation), sum(packing.targets for packing in validation)
    if rows and (rows < FEW_ROWS or targets < FEW_TARGETS):
        say(
            f"validation has {rows:,} {'row' if rows == 1 else 'rows'} with {targets:,} targets: its loss will be noise; build "
            "with more documents or a larger --validation-fraction, into another --output"
        )


def _write_rows(
    plan: PackingPlan, tokenizer: Tokenizer, output: Path, packings: dict[str, dict[str, Packing]]
) -> dict[str, dict[str, SourceRows]]:
    store, policy = TokenStore.open(output / TOKENS_FOLDER), plan.options.packing
    weights = {source.name: source.weight for source in plan.sources}
    row_bytes = policy.row_tokens * store.dtype.itemsize
    splits: dict[str, dict[str, SourceRows]] = {}
    for split in SPLITS:
        shutil.rmtree(output / split, ignore_errors=True)
    rows = sum(packing.rows for sources in packings.values() for packing in sources.values())
    with Progress("packing", rows * row_bytes) as progress:
        for split, source, packing in ((s, n, p) for s, sources in packings.items() for n, p in sources.items()):
            documents = store.documents(split, source)
            chats = plan.options.has_chats
            writer = ShardWriter(
                output, split, source, policy.row_tokens, str(store.dtype), {"plan": plan.sha256}, target_spans=chats
            )
            shards = write_split(
                documents, packing, writer, tokenizer.pad_id, lambda n: progress.advance(n * row_bytes)
            )
            splits.setdefault(split, {})[source] = SourceRows(
                documents=len(documents),
                bytes=int(documents.nbytes.sum()),
                tokens=int(documents.length.sum()),
                rows=packing.rows,
                targets=packing.targets,
                target_bytes=int(documents.targets()[1].sum()) if chats else None,
                weight=weights.get(source),
                shards=shards,
            )
    return splits
