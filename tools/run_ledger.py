"""The ledger of a run's folder, and how `tools.ledger` shows it."""

import contextlib
import csv
import json
import sys
from pathlib import Path
from shlex import quote

from rich.console import Console
from rich.table import Table

from console.progress import say
from data_prep.store import TokenStore
from engine.checkpoint.folder import newest_good
from storage.documents import index_documents, is_indexed, rows_of
from storage.shards import ShardedDataset, open_split
from training.decisions import read_decisions
from training.ledger import SampleLedger, StageSpan, Use
from training.sections import DataConfig
from training.state import TrainState

COLUMNS = ("step", "state", "stage", "sample", "source", "row", "epoch", "documents")


def open_ledger(run: Path) -> SampleLedger:
    """Of a run's folder. Raises ValueError where it is none, or its data are gone."""
    try:
        facts = json.loads((run / "run.json").read_text())
    except OSError:
        raise ValueError(f"{run} has no run.json: give the --output folder of a training run") from None
    found = newest_good(run, full=False)
    seed = facts["recipe"]["training"]["seed"]
    state = found[1].state if found else TrainState(data_fingerprint="", seed=seed, wandb_id="")
    stages = []
    for stage in facts["data"]["stages"]:
        dataset = open_split(Path(stage["path"]), "train", verify="none")  # a shard is checked when it is mapped
        if dataset.manifest.fingerprint != stage["fingerprint"]:
            raise ValueError(f"{stage['path']} is not the data set that the run was trained on: restore it")
        weights = DataConfig(weights=stage["weights"])
        begin, end = stage["first_step"] - 1, stage["last_step"]
        stages.append(StageSpan(stage["name"], dataset, weights, begin, end, stage["batch"]["samples"]))
    return SampleLedger(stages, state, read_decisions(run, state.decisions))


def uses_of(ledger: SampleLedger, wanted: str) -> list[Use]:
    """Every use of a document, by its number or its key, in all data sets of the run, in the order of the steps."""
    datasets = {stage.dataset.manifest.fingerprint: stage.dataset for stage in ledger.stages}
    uses: list[Use] = []
    known = False
    for dataset in datasets.values():
        store = _store(dataset)
        number = int(wanted) if wanted.isdecimal() else store.find(wanted) if store else None
        if number is None:
            continue
        for source in dataset.sources:
            if not is_indexed(dataset, source):
                say(f"{dataset.directory}: every row of {source} is read once, for an index of its documents")
                with contextlib.suppress(OSError):  # read-only: the next question reads them again
                    index_documents(dataset, source)
            for row in rows_of(dataset, source, number):
                known = True
                uses += ledger.of_row(dataset, source, row)
    if not known:
        raise ValueError(f"no row of the run's training data holds a document {wanted!r}")
    return sorted(uses)


def show(ledger: SampleLedger, uses: list[Use], as_csv: bool) -> None:
    """A line a use."""
    keys = {stage.name: _keys(stage, uses) for stage in ledger.stages}
    skipped = {each.step for each in ledger.decisions if each.action == "skip"}

    def state(step: int) -> str:
        if step > ledger.state.step:
            return "to come"
        return "not applied" if step in skipped else "done"

    def lines() -> list[tuple]:
        found = []
        for use in uses:
            documents = " ".join(quote(keys[use.stage][document]) for document in use.documents)
            found.append((use.step, state(use.step), *use[1:6], documents))
        return found

    if as_csv:
        writer = csv.writer(sys.stdout)
        writer.writerow(COLUMNS)
        writer.writerows(lines())
        return
    table = Table(*COLUMNS)
    for line in lines():
        table.add_row(*map(str, line))
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(table)
    for each in ledger.decisions:
        left_out = ", ".join(f"row {sample.row} of {sample.source}" for sample in each.samples)
        console.print(f"at step {each.step}: {each.action} {left_out} ({each.reason})", highlight=False)


def _keys(stage: StageSpan, uses: list[Use]) -> dict[int, str]:
    """Of the documents of a stage's uses, by the units of the token store; their numbers where it is gone."""
    store = _store(stage.dataset)
    documents = sorted({document for use in uses if use.stage == stage.name for document in use.documents})
    return {document: store.key(document) if store else str(document) for document in documents}


def _store(dataset: ShardedDataset) -> TokenStore | None:
    folder = dataset.directory / "tokens"
    return TokenStore.open(folder) if folder.is_dir() else None
