"""Another data set of the token store of an existing one: other rows, the same documents, nothing tokenized again.

    python -m data_prep.repack DATA --seq-length 8192 --output OTHER

What is not given stays as it is in DATA: tokenizer, documents, split, seed, weights of sources, and every packing option.
The result is what `data_prep.build` would make of the same input, byte for byte. Its token store consists of
hard links to the files of DATA (copies on another file system), so either may be deleted. Those files are hashed first, and
a damaged store is refused. After an interruption the same command continues.
"""

if __name__ == "__main__":
    from console.command import end_at_ctrl_c

    end_at_ctrl_c()

import os
import shutil
import time
from pathlib import Path

from pydantic import ValidationError

from console.command import CommandParser, run_command
from console.progress import Progress, say
from data_prep.dropped_report import dropped_problem
from data_prep.find import Source
from data_prep.finish import finish
from data_prep.foresee import say_what_is_foreseen
from data_prep.index import Tokenized
from data_prep.ledger import Ledger, read_ledger, unit_path, write_ledger
from data_prep.options import BuildOptions, add_packing_arguments, packing_from
from data_prep.plan import (
    PLAN_FILE,
    PLAN_VERSION,
    TOKENIZER_FOLDER,
    TOKENS_FOLDER,
    PackingPlan,
    available_cores,
    locked,
    plan_hash,
    read_plan,
    remove_leftovers,
)
from data_prep.store import INDEX_FILE, TokenStore
from data_prep.summary import print_summary
from data_prep.tokenizer import open_tokenizer
from data_prep.verify import tokenizer_problem, unit_problem
from storage.atomic import own_temporary, publish
from storage.manifest import MANIFEST_FILE, Manifest, PackingPolicy, read_manifest


def repack(data: Path, policy: PackingPolicy, output: Path, workers: int | None = None) -> Manifest:
    """Pack the token store of `data` into `output`, by so many processes (None: the cores); return the manifest."""
    origin = read_manifest(data)
    if problem := tokenizer_problem(data, origin):
        raise ValueError(problem)
    plan, plan_before = _plan_of(data, policy)
    with locked(output):
        plan.adopt(output)
        if (output / MANIFEST_FILE).exists():
            say(f"{output} is already complete")
            return read_manifest(output)
        tokens = output / TOKENS_FOLDER
        tokens.mkdir(exist_ok=True)
        remove_leftovers(tokens)
        tokenizer = open_tokenizer(data / origin.tokenizer.file)
        foreseen = say_what_is_foreseen(tokenizer)
        tokenizer_file = tokenizer.save(output / TOKENIZER_FOLDER)
        store = TokenStore.open(data / TOKENS_FOLDER)
        by_field = plan.options.source_field is not None
        _check_index(store, origin, store.sources if by_field else [source.name for source in plan.sources])
        made = Tokenized(
            ledgers=_take_units(store, plan_before, tokens, plan.sha256),
            unit_sources=[source for _, source in store.units],
            inputs=origin.inputs,
            created_by=origin.created_by,
            left_out=origin.left_out,
            foreseen=foreseen,
            repacked_from=origin.fingerprint,
            dropped=_checked(store) if "dropped" in origin.statistics else None,
        )
        return finish(plan, tokenizer, tokenizer_file, output, made, workers or available_cores())


def _plan_of(data: Path, policy: PackingPolicy) -> tuple[PackingPlan, str]:
    """The plan of `data` with another packing, and the hash of its own."""
    try:
        before, times, *_ = read_plan(data)
    except FileNotFoundError:
        raise ValueError(f"{data / PLAN_FILE} is gone: restore it, or build from the documents") from None
    if before.get("version") != PLAN_VERSION:
        raise ValueError(
            f"{data} was built by another version of this program (plan version {before.get('version')}, this one has "
            f"{PLAN_VERSION}): build from the documents"
        )
    content = before | {"packing": policy.model_dump()}
    try:
        fields = BuildOptions.model_fields.items()
        options = BuildOptions(**{n: content[n] for n, field in fields if n in content or not field.exclude_if})
        sources = [Source(name, source["weight"], ()) for name, source in content["sources"].items()]
    except (ValidationError, KeyError, TypeError):
        raise ValueError(f"{data / PLAN_FILE} was written by another version of this program, or changed") from None
    return PackingPlan(options, sources, content, times), plan_hash(before)


def _check_index(store: TokenStore, origin: Manifest, sources: list[str]) -> None:
    """The index has no ledger, but the manifest counts what it lists."""
    listed = {place: counts for place, counts in store.totals().items() if place[0] in origin.splits}
    counted = {
        (split, name): (entry.documents, entry.bytes, entry.tokens)
        for split, entries in origin.splits.items()
        for name, entry in entries.items()
    }
    if store.sources != sources or listed != counted:
        raise ValueError(f"{store.folder / INDEX_FILE} does not list the documents of the manifest: restore it")


def _checked(store: TokenStore) -> Path:
    """The folder of what is left out."""
    if problem := dropped_problem(store):
        raise ValueError(problem)
    return store.folder


def _take_units(store: TokenStore, plan_before: str, output: Path, plan_sha256: str) -> list[Ledger]:
    """Link the store's units into `output` and give each a ledger of the new plan; finished ones are kept."""
    ledgers: list[Ledger] = []
    files = [unit_path(store.folder, unit) for unit in range(len(store.units))]
    total = sum(file.stat().st_size for file in files if file.is_file())
    with Progress("checking", total) as progress:
        for unit, (path, (documents, _)) in enumerate(zip(files, store.units, strict=True)):
            before = _ledger_of(path, unit, plan_before)
            ledger = before.model_copy(update={"plan_sha256": plan_sha256})
            if ledger != read_ledger(output, unit, plan_sha256):
                problem = unit_problem(path, before, full=True)
                if problem is None and before.documents != documents:
                    problem = f"{path} holds {before.documents} documents, the index of its store lists {documents}"
                if problem:
                    raise ValueError(problem)
                _link(path, unit_path(output, unit))
                write_ledger(output, ledger)
            ledgers.append(ledger.without_lists())
            progress.advance(ledger.file_bytes)
    return ledgers


def _ledger_of(path: Path, unit: int, plan_sha256: str) -> Ledger:
    place = path.with_suffix(".json")
    try:
        ledger = Ledger.model_validate_json(place.read_bytes())
    except (OSError, ValueError):
        raise ValueError(f"{place}, the ledger of {path.name}, is missing or damaged: restore it") from None
    if (ledger.unit, ledger.plan_sha256) != (unit, plan_sha256):
        raise ValueError(f"{place} belongs to another data set: restore the right one")
    return ledger


def _link(source: Path, target: Path) -> None:
    temporary = own_temporary(target)
    try:
        try:
            temporary.hardlink_to(source)
        except OSError:  # another file system, or one without links
            with source.open("rb") as reader, temporary.open("wb") as writer:
                shutil.copyfileobj(reader, writer, 1 << 22)
                writer.flush()
                os.fsync(writer.fileno())
        publish(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def main() -> None:
    parser = CommandParser(
        prog="python -m data_prep.repack",
        description=__doc__,
    )
    parser.add_argument("data", type=Path, help="folder made by data_prep.build")
    parser.add_argument("--output", type=Path, required=True, help="folder of the new data set")
    add_packing_arguments(parser, keep=True)
    arguments = parser.parse_args()
    started = time.monotonic()
    policy = packing_from(arguments, read_manifest(arguments.data).packing)
    manifest = repack(arguments.data, policy, arguments.output)
    print_summary(manifest, arguments.output, time.monotonic() - started)


if __name__ == "__main__":
    run_command(main)
