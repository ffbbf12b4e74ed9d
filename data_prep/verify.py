"""Is a prepared data set what its manifest says?

    python -m data_prep.verify DATA [--full]

Without --full: the manifest's fingerprint, the hashes of the tokenizer's files, and of every shard its existence, size,
place, schema and row count (milliseconds a shard); of conversations also that what carries loss lies where it can, and is as
much as the manifest says. With --full also the SHA-256 of every byte. Every problem is printed;
the exit code is 0 only if there is none. DATA may also be what data_prep.export wrote.
"""

if __name__ == "__main__":
    from console.command import end_at_ctrl_c

    end_at_ctrl_c()

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from console.command import CommandParser, run_command
from console.progress import Progress
from data_prep.dropped import DROPPED_FILE
from data_prep.dropped_report import dropped_problem
from data_prep.export_files import EXPORT_FILE, export_problems, read_export
from data_prep.ledger import Ledger
from data_prep.plan import TOKENS_FOLDER
from data_prep.store import INDEX_FILE, TokenStore
from data_prep.targets import Spans, problem_of
from data_prep.unit_file import targets_of_unit
from storage.documents import index_problems
from storage.manifest import Manifest, file_sha256, read_manifest
from storage.shards import ShardedDataset


def problems(directory: Path, full: bool = False) -> Iterator[tuple[int, str | None]]:
    """Check everything; yield per file its bytes and a sentence on what is wrong with it, or None.

    Raises ValueError if there is no readable manifest, without which nothing can be checked.
    """
    manifest = read_manifest(directory)
    yield 0, tokenizer_problem(directory, manifest)
    for file, sha256 in manifest.tokenizer_files.items():
        yield 0, _companion_problem(directory / file, sha256)
    for split in manifest.splits:
        dataset = ShardedDataset(directory, split, manifest)
        yield 0, _index_problem(dataset)
        intact = True
        for shard, problem in dataset.verify(full):
            intact &= problem is None
            yield shard.bytes, problem
        if intact:
            yield from ((0, words) for source in dataset.sources for words in index_problems(dataset, source, full))
        if intact and manifest.target_spans:
            yield from ((0, problem) for problem in _target_problems(dataset))
    if (directory / TOKENS_FOLDER).is_dir():  # training does not need it, so it may be gone
        yield from _token_store_problems(directory / TOKENS_FOLDER, manifest, full)


def tokenizer_problem(directory: Path, manifest: Manifest) -> str | None:
    """What is wrong with the tokenizer in a data set."""
    path = directory / manifest.tokenizer.file
    if not path.is_file():
        return f"{path} is missing: the tokenizer belongs to the data set, restore it"
    if hashlib.sha256(path.read_bytes()).hexdigest() != manifest.tokenizer.sha256:
        return f"{path} is not the tokenizer that made this data set: restore it"
    return None


def _companion_problem(path: Path, sha256: str) -> str | None:
    if not path.is_file():
        return f"{path} is missing: it belongs to the tokenizer, restore it"
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        return f"{path} has changed since the data set was made: it belongs to the tokenizer, restore it"
    return None


def _index_problem(dataset: ShardedDataset) -> str | None:
    """Would `datasets.load_from_disk` open the same files in the same order?"""
    path = dataset.directory / dataset.split / "state.json"
    sources = dataset.manifest.splits[dataset.split]
    expected = [Path(shard.file).name for name in dataset.sources for shard in sources[name].shards]
    if not expected:
        return None
    try:
        found = [entry["filename"] for entry in json.loads(path.read_bytes())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{path} cannot be read ({error}): `datasets` cannot open this split"
    return None if found == expected else f"{path} lists other files than the manifest"


def _target_problems(dataset: ShardedDataset) -> Iterator[str]:
    """Is every token that carries loss inside a piece of its row, and no context; are there as many as the manifest says?"""
    for source in dataset.sources:
        place, counted = f"source {source} in split {dataset.split}", 0
        for first, block in dataset.blocks(source):
            assert block.target_splits is not None
            assert block.target_spans is not None
            spans = Spans(block.target_splits.astype(np.int64), *block.target_spans.T.astype(np.int64))
            row = np.repeat(np.arange(len(block.ids)), np.diff(block.splits))
            before = np.cumsum(block.seg_len, dtype=np.int64) - block.seg_len
            end = before - before[block.splits[:-1]][row] + block.seg_len
            possible = np.stack([end - block.seg_len + np.maximum(block.seg_ctx, 1), end], axis=1)
            if words := problem_of(spans, Spans(block.splits.astype(np.int64), *possible.T)):
                yield f"rows {first} to {first + len(block.ids) - 1} of {place}: targets {words}"
            counted += spans.tokens
        targets = dataset.manifest.splits[dataset.split][source].targets
        if counted != targets:
            yield f"{place} has {counted:,} targets, its manifest says {targets:,}"


def _token_store_problems(folder: Path, manifest: Manifest, full: bool) -> Iterator[tuple[int, str | None]]:
    try:
        store = TokenStore.open(folder)
    except ValueError as error:
        yield 0, str(error)
        return
    kept = sum(entry.documents for sources in manifest.splits.values() for entry in sources.values())
    if sum(counts[0] for (split, _), counts in store.totals().items() if split in manifest.splits) != kept:
        yield 0, f"{folder / INDEX_FILE} does not list the {kept} documents of the manifest"
    documents, complete, intact = 0, True, True
    for path in sorted({path.with_suffix(".arrow") for path in folder.glob("unit-*.*")}):
        try:
            ledger = Ledger.model_validate_json(path.with_suffix(".json").read_bytes())
        except (OSError, ValueError):
            complete = False
            yield 0, f"{path.with_suffix('.json')}, the ledger of {path.name}, is missing or damaged"
            continue
        problem = unit_problem(path, ledger, full)
        if problem is None and ledger.targets is not None:
            problem = _unit_target_problem(path, ledger)
        yield ledger.file_bytes, problem
        intact &= problem is None
        documents += ledger.documents
    if complete and documents != len(store):
        yield 0, f"{folder} lacks units: those present hold {documents:,} documents, its index lists {len(store):,}"
    elif complete and intact and ("dropped" in manifest.statistics or (folder / DROPPED_FILE).exists()):
        yield 0, dropped_problem(store)


def _unit_target_problem(path: Path, ledger: Ledger) -> str | None:
    try:
        targets, lengths = targets_of_unit(path)
    except ValueError as error:
        return str(error)
    whole = Spans(np.arange(len(lengths) + 1), np.zeros_like(lengths), lengths)
    if words := problem_of(targets, whole):
        return f"{path}: targets {words}"
    if targets.tokens != ledger.targets:
        return f"{path} has {targets.tokens:,} targets, its ledger says {ledger.targets:,}"
    return None


def unit_problem(path: Path, ledger: Ledger, full: bool) -> str | None:
    """What is wrong with a unit's file; `full`: its content is hashed, too."""
    if not path.is_file():
        return f"{path} is missing: restore it or build the data set again"
    if path.stat().st_size != ledger.file_bytes:
        return f"{path} has {path.stat().st_size} bytes, its ledger says {ledger.file_bytes}"
    if full and file_sha256(path) != ledger.sha256:
        return f"{path} has changed: its sha256 is not its ledger's"
    return None


def main() -> None:
    parser = CommandParser(prog="python -m data_prep.verify", description=__doc__)
    parser.add_argument("data", type=Path, help="folder made by data_prep.build")
    parser.add_argument("--full", action="store_true", help="also hash every byte (about 2 GB/s; default: no)")
    arguments = parser.parse_args()
    how = "every byte hashed" if arguments.full else "sizes and structure; --full also hashes every byte"
    if (arguments.data / EXPORT_FILE).exists():
        exported = read_export(arguments.data)
        total = sum(facts["bytes"] for facts in exported["files"])
        checked = _checked(export_problems(arguments.data, arguments.full), total)
        print(f"{arguments.data} is intact: {len(exported['files']):,} files, {checked / 1e6:,.1f} MB ({how})")
        print(f"exported from {exported['fingerprint']}")
        return
    manifest = read_manifest(arguments.data)
    shards = [s for sources in manifest.splits.values() for entry in sources.values() for s in entry.shards]
    checked = _checked(problems(arguments.data, arguments.full), sum(shard.bytes for shard in shards))
    rows = sum(shard.rows for shard in shards)
    print(f"{arguments.data} is intact: {rows:,} rows in {len(shards):,} shards, {checked / 1e6:,.1f} MB ({how})")
    print(f"fingerprint {manifest.fingerprint}")


def _checked(results: Iterable[tuple[int, str | None]], total: int) -> int:
    """The bytes that were checked; ends the process if something is wrong with them."""
    found: list[str] = []
    checked = 0
    with Progress("verifying", total) as progress:
        for size, problem in results:
            found += [problem] if problem else []
            checked += size
            progress.advance(size)
    if found:
        print("\n".join(f"error: {problem}" for problem in found), file=sys.stderr)
        sys.exit(2)
    return checked


if __name__ == "__main__":
    run_command(main)
