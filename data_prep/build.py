"""Raw documents to a data set that can be trained on.

    python -m data_prep.build --input DOCS... --tokenizer TOK --seq-length 4096 --output DATA [--workers N]

1. plan: find the files, cut them into units of work, compare with what the output folder already holds
2. tokenize: every unit to one file of the token store, in worker processes (data_prep/encode.py, store.py)
3. index: once all units are there, decide duplicates and the split, by document order and hash only
4. pack: per split and source, documents to rows (pack.py), rows to shards (training/shards.py)
5. manifest: written last; without it the folder is not a data set

The output depends on the plan alone, not on workers, their timing or interruptions. After a kill at any moment the
same command continues: finished units are kept, the rest is done, packing (seconds) starts over.
"""

import argparse
import datetime
import importlib.metadata
import shutil
import time
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from data_prep.command import run_command
from data_prep.encode import Work, choose_encoder
from data_prep.pack import Packing, pack, write_split
from data_prep.plan import (
    TOKENIZER_FOLDER,
    TOKENS_FOLDER,
    BuildOptions,
    Plan,
    available_cores,
    locked,
    remove_leftovers,
    unfinished,
)
from data_prep.progress import Progress, say
from data_prep.sources import parse_sources
from data_prep.store import LEFT_OUT, SPLITS, Columns, Ledger, TokenStore, read_columns, read_ledger, write_index
from data_prep.summary import print_summary, statistics
from data_prep.tokenizer import Tokenizer, open_tokenizer
from data_prep.workers import encode_units
from training.manifest import MANIFEST_FILE, Manifest, PackingPolicy, SourceRows, read_manifest
from training.shards import ShardWriter, write_manifest


def build(
    plan: Plan, tokenizer: Tokenizer, output: Path, workers: int = 1, on_error: str = "fail", encoder: str = "auto"
) -> Manifest:
    """Run all steps that are still to be done and return the manifest."""
    with locked(output):
        plan.adopt(output)
        if (output / MANIFEST_FILE).exists():
            say(f"{output} is already complete")
            return read_manifest(output)
        tokens = output / TOKENS_FOLDER
        tokens.mkdir(exist_ok=True)
        remove_leftovers(tokens)
        tokenizer_file = tokenizer.save(output / TOKENIZER_FOLDER)
        ledgers = _tokenize(plan, tokenizer, tokenizer_file, output, workers, on_error, encoder)
        columns, split, duplicates = _index(plan, ledgers, tokens)
        splits, packings = _pack(plan, tokenizer, output)
        manifest = Manifest(
            created_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            created_by={name: importlib.metadata.version(name) for name in ("sentencepiece", "tokenizers", "pyarrow")},
            inputs=plan.input_hashes([ledger.input_sha256 for ledger in ledgers]),
            tokenizer=tokenizer.info(tokenizer_file.relative_to(output).as_posix()),
            dtype=str(tokenizer.dtype),
            packing=plan.options.packing,
            seed=plan.options.seed,
            splits=splits,
            statistics=statistics(ledgers, columns, split, duplicates, packings),
        )
        return write_manifest(output, manifest)


def _tokenize(
    plan: Plan, tokenizer: Tokenizer, tokenizer_file: Path, output: Path, workers: int, on_error: str, encoder: str
) -> list[Ledger]:
    tokens = output / TOKENS_FOLDER
    done = {u.index: ledger for u in plan.units if (ledger := read_ledger(tokens, u.index, plan.sha256))}
    todo = unfinished(plan.units, done)
    if todo:
        fields = plan.options.text_field, plan.options.id_field
        accelerated, reason = choose_encoder(encoder, tokenizer, todo, plan.files, fields)
        say(f"{len(plan.units):,} units of work, {len(done):,} done before; encoder: {reason}")
        work = Work(tokens, tokenizer_file, plan.sha256, plan.files, *fields, plan.options.seed, on_error, accelerated)
        with Progress("tokenizing", sum(unit.size for unit in plan.units)) as progress:
            progress.resume_at(sum(plan.units[unit].size for unit in done))
            for ledger in encode_units(work, todo, workers, progress):
                done[ledger.unit] = ledger
    ledgers = [done[unit.index] for unit in plan.units]
    skipped = [example for ledger in ledgers for example in ledger.examples]
    if skipped and on_error == "fail":
        raise ValueError(f"{skipped[0]}; an earlier run with --on-error skip left such records out, this one must not")
    return ledgers


def _index(plan: Plan, ledgers: list[Ledger], tokens: Path) -> tuple[Columns, np.ndarray, np.ndarray]:
    """Decide every document's split (a position in SPLITS, or LEFT_OUT) and write the store's index."""
    columns = read_columns(tokens, plan.unit_sources())
    names = [source.name for source in plan.sources]
    duplicates = find_duplicates(columns)
    split = np.where(columns.key_hash < np.uint64(int(plan.options.validation_fraction * 2**64)), 1, 0).astype(np.uint8)
    if plan.options.deduplicate:
        split[duplicates] = LEFT_OUT
    if not np.any(split != LEFT_OUT):
        raise ValueError(f"the input holds no text: {sum(ledger.empty for ledger in ledgers)} empty documents")
    if plan.options.validation_fraction > 0:
        _fill_validation(columns, split, names)
    write_index(tokens, columns, split, [ledger.documents for ledger in ledgers], names)
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


def _pack(
    plan: Plan, tokenizer: Tokenizer, output: Path
) -> tuple[dict[str, dict[str, SourceRows]], dict[str, dict[str, Packing]]]:
    store, policy = TokenStore.open(output / TOKENS_FOLDER), plan.options.packing
    splits: dict[str, dict[str, SourceRows]] = {}
    packings: dict[str, dict[str, Packing]] = {}
    for split in SPLITS:
        shutil.rmtree(output / split, ignore_errors=True)
    parts = {(split, source): store.documents(split, source.name) for split in SPLITS for source in plan.sources}
    total = sum(int(documents.length.sum()) for documents in parts.values()) * store.dtype.itemsize
    with Progress("packing", total) as progress:
        for (split, source), documents in parts.items():
            if not len(documents):
                continue
            packing = pack(documents.length, policy.row_tokens, policy, plan.options.seed)
            if not packing.rows:
                raise ValueError(
                    f"{source.name}: its {int(documents.length.sum())} tokens for {split} do not fill one row of "
                    f"{policy.row_tokens}: use --tail pad or a smaller --seq-length"
                )
            writer = ShardWriter(output, split, source.name, policy.row_tokens, str(store.dtype), {"plan": plan.sha256})
            row_bytes = policy.row_tokens * store.dtype.itemsize
            shards = write_split(
                documents, packing, writer, tokenizer.pad_id, lambda n, b=row_bytes: progress.advance(n * b)
            )
            packings.setdefault(split, {})[source.name] = packing
            splits.setdefault(split, {})[source.name] = SourceRows(
                documents=len(documents),
                bytes=int(documents.nbytes.sum()),
                tokens=int(documents.length.sum()),
                rows=packing.rows,
                targets=packing.targets,
                weight=source.weight,
                shards=shards,
            )
    return splits, packings


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--input", nargs="+", default=[], metavar="DOCS", help="files, folders or globs (source `documents`)")
    add("--source", action="append", default=[], metavar="NAME=PATH:WEIGHT", help="a named source; may be repeated")
    add("--tokenizer", required=True, help="SentencePiece .model, tokenizer.json, or a folder with one")
    add("--output", type=Path, required=True, help="folder of the data set")
    add("--seq-length", type=int, required=True, help=_field(PackingPolicy, "seq_length"))
    add("--packing", default="bestfit", help=_field(PackingPolicy, "policy"))
    add("--overlap", type=int, default=1, help=_field(PackingPolicy, "overlap"))
    add("--tail", default="pad", help=_field(PackingPolicy, "tail"))
    for name, field in BuildOptions.model_fields.items():
        if name == "deduplicate":
            add("--deduplicate", action="store_true", help=field.description)
        elif name != "packing":
            kind = int if "int" in str(field.annotation) else float if field.annotation is float else str
            words = "" if field.default is None else f" (default: {field.default})"
            add(f"--{name.replace('_', '-')}", type=kind, default=field.default, help=f"{field.description}{words}")
    add("--workers", type=int, default=available_cores(), help="processes (default: the cores, here %(default)s)")
    add("--on-error", choices=("fail", "skip"), default="fail", help="bad records: end, or leave out and count")
    encoder_help = "auto: gigatoken if installed and proven identical here; plain: never; accelerated: or fail"
    add("--encoder", choices=("auto", "plain", "accelerated"), default="auto", help=encoder_help)
    return parser.parse_args()


def _field(model, name: str) -> str:
    field = model.model_fields[name]
    return field.description + ("" if field.is_required() else f" (default: {field.default})")


def options_from(arguments: argparse.Namespace) -> BuildOptions:
    names = set(BuildOptions.model_fields) - {"packing"}
    packing = {name: getattr(arguments, name) for name in ("seq_length", "overlap", "tail")}
    try:
        policy = PackingPolicy(policy=arguments.packing, **packing)
        return BuildOptions(packing=policy, **{name: getattr(arguments, name) for name in names})
    except ValidationError as error:
        problems = (
            f"--{str((*problem['loc'], 'packing')[0]).replace('_', '-')}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors()
        )
        raise ValueError("; ".join(problems)) from None


def main() -> None:
    arguments = parse_arguments()
    if arguments.workers < 1:
        raise ValueError(f"--workers {arguments.workers}: at least 1")
    started = time.monotonic()
    options = options_from(arguments)
    tokenizer = open_tokenizer(arguments.tokenizer)
    plan = Plan(parse_sources(arguments.input, arguments.source), options, tokenizer)
    manifest = build(plan, tokenizer, arguments.output, arguments.workers, arguments.on_error, arguments.encoder)
    print_summary(manifest, arguments.output, time.monotonic() - started)


if __name__ == "__main__":
    run_command(main)
