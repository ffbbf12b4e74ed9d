"""Raw documents to a data set that can be trained on.

    python -m data_prep.build --input DOCS... --tokenizer TOK --seq-length 4096 --output DATA [--workers N]

1. plan: find the files, cut them into units of work, compare with what the output folder already holds
2. tokenize: every unit to one file of the token store, in worker processes (data_prep/encode.py, store.py)
3. index: once all units are there, decide duplicates and the split, by document order and hash only
4. pack: per split and source, documents to windows (cut.py), windows to rows (pack.py), rows to shards
5. manifest: written last; without it the folder is not a data set

Of conversations (--messages-field, or --prompt-field and --response-field) a chat template makes the texts, and only what
the assistant writes carries loss (data_prep/chat.py).

The output depends on the plan alone, not on workers, their timing or interruptions. After a kill at any moment the
same command continues: finished units are kept, the rest is done, packing (seconds) starts over. On many machines with one
file system, --part 1/8 to 8/8 share step 2 (data_prep/units/parts.py), or a Ray cluster does it (--engine ray). Steps 3 to
5 (data_prep/finish.py) alone make another data set of the same token store: data_prep/repack.py.
"""

if __name__ == "__main__":
    from console.command import end_at_ctrl_c

    end_at_ctrl_c()

import argparse
import importlib
import importlib.metadata
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from console.command import CommandParser, run_command
from console.progress import Progress, say
from data_prep.chat import keep_template, read_template
from data_prep.encode import Work, choose_encoder
from data_prep.filters import filter_hashes
from data_prep.finish import finish
from data_prep.foresee import say_what_is_foreseen
from data_prep.index import Tokenized
from data_prep.leave_out import evaluation_files
from data_prep.ledger import Ledger, finished_units, read_ledger
from data_prep.options import BuildOptions, add_packing_arguments, option_problems, packing_from
from data_prep.plan import (
    TOKENIZER_FOLDER,
    TOKENS_FOLDER,
    Plan,
    available_cores,
    locked,
    remove_leftovers,
    unfinished,
)
from data_prep.records import BadInput, Unit
from data_prep.sources import parse_sources
from data_prep.summary import by_reason, left_out_words, print_summary
from data_prep.tokenizer import Tokenizer, open_tokenizer
from data_prep.units.parts import Share, joined_parts, part_from, parts_wait
from data_prep.units.pool import encode_units
from storage.manifest import MANIFEST_FILE, Manifest, read_manifest


class How(NamedTuple):
    """What the result does not depend on."""

    workers: int | None = 1
    """None: as many as there is room for on the Ray cluster."""
    on_error: str = "fail"
    encoder: str = "auto"
    ray_address: str | None = None


DEFAULT = How()


def build(plan: Plan, tokenizer: Tokenizer, output: Path, how: How = DEFAULT) -> Manifest:
    """Run all steps that are still to be done and return the manifest."""
    with locked(output):
        plan.adopt(output)
        _say_what_is_not_read(plan)
        if is_complete(output):
            say(f"{output} is already complete")
            return read_manifest(output)
        tokenizer_file = _begin(plan, tokenizer, output)
        foreseen = say_what_is_foreseen(tokenizer)
        try:
            ledgers = _tokenize(plan, plan.units, tokenizer, tokenizer_file, output, how)
        except BadInput:
            plan.note_failure(output)
            raise
        remove_leftovers(output / TOKENS_FOLDER)  # of workers that died on the way
        packages = ("sentencepiece", "tokenizers", *(("transformers", "jinja2") if plan.options.has_chats else ()))
        made = Tokenized(
            ledgers=ledgers,
            unit_sources=plan.unit_sources(),
            inputs=plan.input_hashes([ledger.input_sha256 for ledger in ledgers]),
            left_out=by_reason([*plan.left_out, *(entry for ledger in ledgers for entry in ledger.left_out)]),
            created_by={name: importlib.metadata.version(name) for name in packages},
            foreseen=foreseen,
        )
        return finish(plan, tokenizer, tokenizer_file, output, made, how.workers or available_cores())


def build_part(plan: Plan, tokenizer: Tokenizer, output: Path, part: Share, how: How = DEFAULT) -> None:
    """Tokenize the units that fall to this part and are still to be done; others may do so with theirs at the same time."""
    share = part.of_units(plan.units)
    with joined_parts(output, plan, lambda: None if is_complete(output) else _begin(plan, tokenizer, output)):
        _say_what_is_not_read(plan)
        if is_complete(output):
            say(f"{output} is already complete")
            return
        tokenizer_file = tokenizer.file_in(output / TOKENIZER_FOLDER)
        try:
            _tokenize(plan, share, tokenizer, tokenizer_file, output, how)
        except BadInput:
            with parts_wait(output):
                plan.note_failure(output)
            raise
        finished = len(finished_units(output / TOKENS_FOLDER))
    last = "; the same command without --part makes the data set" if finished == len(plan.units) else ""
    say(f"part {part} has its {len(share):,} units of work; {finished:,} of all {len(plan.units):,} are finished{last}")


def is_complete(output: Path) -> bool:
    """Is there a data set already?"""
    return (output / MANIFEST_FILE).exists()


def _say_what_is_not_read(plan: Plan) -> None:
    for words in left_out_words(by_reason(plan.left_out)):
        say(words)


def _begin(plan: Plan, tokenizer: Tokenizer, output: Path) -> Path:
    """What is there before any unit; returns the tokenizer's file. Nobody else may be writing to the folder."""
    tokens = output / TOKENS_FOLDER
    tokens.mkdir(exist_ok=True)
    remove_leftovers(tokens)
    tokenizer_file = tokenizer.save(output / TOKENIZER_FOLDER)
    keep_template(plan.options.chat_template, tokenizer_file.parent)
    return tokenizer_file


def _tokenize(
    plan: Plan,
    units: list[Unit],
    tokenizer: Tokenizer,
    tokenizer_file: Path,
    output: Path,
    how: How,
) -> list[Ledger]:
    """The ledgers of these units, in their order, each of them finished."""
    tokens = output / TOKENS_FOLDER
    done = {u.index: ledger.without_lists() for u in units if (ledger := read_ledger(tokens, u.index, plan.sha256))}
    if how.on_error == "fail":  # what an earlier run with "skip" left out must be found again
        done = {unit: ledger for unit, ledger in done.items() if not ledger.skipped}
    todo = unfinished(units, done)
    if todo:
        fields = plan.options.text_field, plan.options.id_field
        chat = plan.options.chat_format(tokenizer)
        if chat:
            chat.check()
            if how.encoder == "accelerated":
                raise ValueError("--encoder accelerated: conversations are encoded by the tokenizer itself")
            accelerated, reason = None, "the tokenizer itself"
        else:
            accelerated, reason = choose_encoder(how.encoder, tokenizer, todo, plan.files, fields)
        say(f"{len(units):,} units of work, {len(done):,} done before; encoder: {reason}")
        places = tokens, tokenizer_file, plan.sha256, plan.files
        filters = tuple(spec for spec, _ in plan.options.filters or ())
        source_field = plan.options.source_field
        work = Work(*places, *fields, plan.options.seed, how.on_error, accelerated, chat, source_field, filters)
        with Progress("tokenizing", sum(unit.size for unit in units)) as progress:
            progress.resume_at(sum(plan.units[unit].size for unit in done))
            for ledger in _encode(work, todo, how, progress):
                done[ledger.unit] = ledger.without_lists()
    return [done[unit.index] for unit in units]


def _encode(work: Work, units: list[Unit], how: How, progress: Progress) -> Iterator[Ledger]:
    if how.ray_address is None:
        return encode_units(work, units, how.workers or available_cores(), progress)
    from data_prep.units.ray import encode_on_ray

    return encode_on_ray(work, units, how.ray_address, how.workers, progress)


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m data_prep.build",
        description=__doc__,
    )
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        default=[],
        metavar="DOCS",
        help="files, folders or globs, here or at s3://... (source `documents`)",
    )
    add("--source", action="append", default=[], metavar="NAME=PATH:WEIGHT", help="a named source; may be repeated")
    add("--tokenizer", required=True, help="SentencePiece .model, tokenizer.json, or a folder with one")
    add("--output", type=Path, required=True, help="folder of the data set")
    add_packing_arguments(parser)
    for name, field in BuildOptions.model_fields.items():
        if name == "deduplicate":
            add("--deduplicate", action="store_true", help=field.description)
        elif name == "filters":
            add("--filter", dest="filters", action="append", metavar="FILTER", help=field.description)
        elif name == "evaluation":
            add("--evaluation", nargs="+", metavar="DOCS", help=field.description)
        elif name != "packing":
            kind = int if "int" in str(field.annotation) else float if "float" in str(field.annotation) else str
            words = "" if field.default is None else f" (default: {field.default})"
            add(f"--{name.replace('_', '-')}", type=kind, default=field.default, help=f"{field.description}{words}")
    workers_help = f"processes (default: the cores, here {available_cores()}; of a Ray cluster all)"
    add("--workers", type=int, help=workers_help)
    add("--engine", choices=("pool", "ray"), default="pool", help="who tokenizes: processes here, or a Ray cluster")
    add(
        "--ray-address", metavar="HOST:PORT", help="the cluster's head (default: the cluster that this node is part of)"
    )
    parts_help = "do share I of N of the units of work and end; the same command without --part then makes the data set"
    add("--part", metavar="I/N", help=parts_help)
    add("--on-error", choices=("fail", "skip"), default="fail", help="bad records: end, or leave out and count")
    encoder_help = "auto: gigatoken if installed and proven identical here; plain: never; accelerated: or fail"
    add("--encoder", choices=("auto", "plain", "accelerated"), default="auto", help=encoder_help)
    return parser.parse_args()


def options_from(arguments: argparse.Namespace) -> BuildOptions:
    """Raises ValueError for what does not go together, by the flags' names."""
    packing = packing_from(arguments)
    given = {name: getattr(arguments, name) for name in set(BuildOptions.model_fields) - {"packing"}}
    if given["chat_template"] is not None:
        given["chat_template"] = read_template(Path(given["chat_template"]))
    if given["filters"] is not None:
        given["filters"] = filter_hashes(given["filters"])
    if given["evaluation"] is not None:
        given["evaluation"] = evaluation_files(given["evaluation"])
    try:
        return BuildOptions(packing=packing, **given)
    except ValidationError as error:
        raise ValueError(option_problems(error)) from None


def ray_address_from(arguments: argparse.Namespace) -> str | None:
    """Raises ValueError where Ray cannot be used."""
    if arguments.engine != "ray":
        if arguments.ray_address is not None:
            raise ValueError(f"--ray-address {arguments.ray_address} needs --engine ray")
        return None
    if arguments.part is not None:
        raise ValueError("--part and --engine ray both share out the units of work: choose one")
    try:
        importlib.import_module("ray")
    except ImportError:
        raise ValueError("--engine ray needs Ray, on all nodes: pip install -r requirements-cluster.txt") from None
    return arguments.ray_address or "auto"


def main() -> None:
    arguments = parse_arguments()
    if arguments.workers is not None and arguments.workers < 1:
        raise ValueError(f"--workers {arguments.workers}: at least 1")
    ray_address = ray_address_from(arguments)
    started = time.monotonic()
    part = None if arguments.part is None else part_from(arguments.part)
    options = options_from(arguments)
    if options.source_field is not None and arguments.source:
        raise ValueError("--source-field names the sources by itself: give the files with --input, not with --source")
    tokenizer = open_tokenizer(arguments.tokenizer)
    for notice in tokenizer.notices:
        say(notice)
    plan = Plan(parse_sources(arguments.input, arguments.source), options, tokenizer, arguments.on_error)
    how = How(arguments.workers, arguments.on_error, arguments.encoder, ray_address)
    if part is not None:
        build_part(plan, tokenizer, arguments.output, part, how)
        return
    manifest = build(plan, tokenizer, arguments.output, how)
    print_summary(manifest, arguments.output, time.monotonic() - started)


if __name__ == "__main__":
    run_command(main)
