"""What one rank of very many holds and computes, by simulation: `python -m bench.scale [--tokens 1e13] [--ranks 16384]`.

The real code of sampler, manifests and checkpoint index is fed with sizes that are made up: a data set of so many tokens in
shards of 256 MB, a checkpoint of ZeRO-3 with two files a rank. Nothing else is on the disk but one shard (what mapping it
costs is counted for all that a rank would map), the pieces of the rows of one source (3.9 GB), and as many empty files as the
checkpoint has. Every figure is a process of its own: seconds, and the peak of anonymous memory above that before.
"""

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.rows import Peak
from console.command import CommandParser

SEQ_LENGTH, SOURCES, SHARD_ROWS = 4096, 20, 32 * 1024
MICRO_BATCH = 1
DIGEST = "0" * 32


def save_data(folder: Path, tokens: int, ranks: int) -> dict[str, Any]:
    """The first rank of a build writes the manifest of the data set."""
    from bench.loader_readers import manifest_of, write_data
    from storage.manifest import PackingPolicy, Shard, SourceRows, save_manifest, write_datasets_index
    from storage.rows import SEGMENT_COLUMNS

    real = write_data(folder / "one", SHARD_ROWS, SEQ_LENGTH).splits["train"]["random"].shards[0]
    each = max(1, tokens // SEQ_LENGTH // SOURCES // real.rows)
    entries = {}
    for source in range(SOURCES):
        name = f"source{source:02d}"
        shards = [
            Shard(
                **real.model_dump(exclude={"file", "sha256"}),
                file=f"train/shard-{name}-{n:05d}.arrow",
                sha256=f"{n:064x}",
            )
            for n in range(each)
        ]
        rows = each * real.rows
        counts = {
            "documents": rows,
            "bytes": 4 * rows * SEQ_LENGTH,
            "tokens": rows * SEQ_LENGTH,
            "targets": rows * SEQ_LENGTH,
        }
        entries[name] = SourceRows(**counts, rows=rows, shards=shards)
    manifest = manifest_of(PackingPolicy(seq_length=SEQ_LENGTH), entries["source00"])
    manifest = manifest.model_copy(update={"splits": {"train": entries}})
    (folder / "train").mkdir()
    with Peak() as peak:
        save_manifest(folder, manifest)
        write_datasets_index(folder, manifest, SEGMENT_COLUMNS)
    size = (folder / "manifest.json").stat().st_size
    return peak.result | {"note": f"{SOURCES * each:,} shards, {size / 1e6:.1f} MB"}


def open_data(folder: Path, tokens: int, ranks: int) -> dict[str, Any]:
    """Every rank reads it at its start."""
    from storage.shards import open_split

    with Peak() as peak:
        dataset = open_split(folder, "train", verify="none")
    return peak.result | {"note": f"{len(dataset):,} rows"}


def look_at_shards(folder: Path, tokens: int, ranks: int) -> dict[str, Any]:
    """Every rank compares size, schema and rows of all shards with the manifest at its start."""
    from storage.shards import open_split

    (dataset, shards) = (open_split(folder / "one", "train", verify="none"), len(_all_shards(folder)))
    with Peak() as peak:
        for _ in range(20):
            assert [problem for _, problem in dataset.verify()] == [None] * len(_all_shards(folder / "one"))
    each = peak.result["seconds"] / 20 / len(_all_shards(folder / "one"))
    return peak.result | {"seconds": each * shards, "note": f"{1000 * each:.2f} ms a shard that is in memory"}


def _all_shards(folder: Path) -> list[Any]:
    from storage.manifest import read_manifest

    return [shard for entry in read_manifest(folder).splits["train"].values() for shard in entry.shards]


def make_order(folder: Path, tokens: int, ranks: int) -> dict[str, Any]:
    """Every rank at its start: the order of all samples, and what a stage has taken of it half way."""
    from storage.shards import open_split
    from training.data import training_order
    from training.sections import DataConfig

    dataset = open_split(folder, "train", verify="none")
    with Peak() as peak:
        order = training_order(dataset, DataConfig(), 0)
        order.drawn_after(len(dataset) // 2 + 1)
    return peak.result


def place_step(folder: Path, tokens: int, ranks: int) -> dict[str, Any]:
    """Every rank in every step: which rows all ranks take."""
    from storage.shards import open_split
    from training.data import TrainingData, training_order
    from training.sections import DataConfig

    dataset = open_split(folder, "train", verify="none")
    data = TrainingData(dataset, training_order(dataset, DataConfig(), 0))
    rows = ranks * MICRO_BATCH
    with Peak() as peak:
        for step in range(5):
            data.places(10**9 + step * rows + np.arange(rows))
    return peak.result | {"seconds": peak.result["seconds"] / 5, "note": f"{rows:,} rows a step"}


def deal_step(folder: Path, tokens: int, ranks: int) -> dict[str, Any]:
    """Every rank in every step: who takes which, by their cost."""
    from training.balance import deal

    costs = np.random.default_rng(0).integers(10**5, 10**7, ranks * MICRO_BATCH)
    with Peak() as peak:
        deal(costs, MICRO_BATCH, ranks)
    return peak.result


def write_pieces(folder: Path, tokens: int, ranks: int) -> dict[str, Any]:
    """A build writes the pieces of every row beside the shards: here of one source, and that file once more for each other."""
    from storage.atomic import new_stream
    from storage.pieces import PieceWriter, pieces_schema
    from storage.rows import RowBlock
    from storage.shards import open_split

    dataset = open_split(folder, "train", verify="none")
    first, *others = dataset.sources
    schema, rows = pieces_schema(dataset.manifest.splits["train"][first].shards_hash), dataset.rows_per_source[first]
    none = np.zeros((0, 0), np.uint16)
    with Peak() as peak, new_stream(dataset.piece_path(first), schema) as stream:
        writer = PieceWriter(stream, schema)
        for begin in range(0, rows, SHARD_ROWS):
            count = 2 * min(SHARD_ROWS, rows - begin)
            splits, lengths = np.arange(0, count + 1, 2, dtype=np.int32), np.full(count, SEQ_LENGTH // 2, np.int32)
            writer.add(RowBlock(none, splits, lengths, lengths, 2 * begin + np.arange(count), lengths))
        writer.flush()
    for source in others:
        os.link(dataset.piece_path(first), dataset.piece_path(source))
    size = dataset.piece_path(first).stat().st_size
    return peak.result | {"note": f"{rows:,} rows of two pieces each, {size / 1e6:,.0f} MB"}


def _opened_with_pieces(folder: Path) -> Any:
    """The data set, of whose files of pieces nothing is in memory."""
    from storage.shards import open_split

    dataset = open_split(folder, "train", verify="none")
    with dataset.piece_path(dataset.sources[0]).open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return dataset


def cost_step(folder: Path, tokens: int, ranks: int) -> dict[str, Any]:
    """Every rank in every step: the cost of all these rows, from the files of pieces."""
    from training.balance import row_costs
    from training.config import load_recipe
    from training.data import TrainingData, training_order
    from training.sections import DataConfig

    recipe, dataset = load_recipe("recipes/llama-8b.yaml", {}), _opened_with_pieces(folder)
    data, rows, times = TrainingData(dataset, training_order(dataset, DataConfig(), 0)), ranks * MICRO_BATCH, []
    steps = [data.places(10**9 + step * rows + np.arange(rows)) for step in range(5)]
    with Peak() as peak:
        for places in steps:
            began = time.perf_counter()
            row_costs(dataset, *places, recipe.model.visibility)
            times.append(time.perf_counter() - began)
    note = f"the first, which also opens the files, {times[0]:.2f} s; of the others the slowest is given"
    return peak.result | {"seconds": max(times[1:]), "note": note}


def cost_step_by_shards(folder: Path, tokens: int, ranks: int) -> dict[str, Any]:
    """The same without these files: from the shards that the rows lie in."""
    from storage.mapped import MappedShard
    from storage.shards import open_split
    from training.balance import row_costs
    from training.config import load_recipe

    recipe, dataset = load_recipe("recipes/llama-8b.yaml", {}), open_split(folder / "one", "train", verify="none")
    rows, shards = ranks * MICRO_BATCH, len(_all_shards(folder))
    distinct = round(shards * (1 - (1 - 1 / shards) ** rows))
    sources = np.zeros(rows, np.int64)
    with Peak() as peak:
        row_costs(dataset, sources, np.random.default_rng(0).integers(0, len(dataset), rows), recipe.model.visibility)
    path = folder / "one" / _all_shards(folder / "one")[0].file
    started = time.perf_counter()
    kept = [MappedShard(path) for _ in range(20)]
    each = (time.perf_counter() - started) / len(kept)
    note = f"{distinct:,} shards to map, {1000 * each:.2f} ms each; the rows themselves {peak.result['seconds']:.2f} s"
    return peak.result | {"seconds": peak.result["seconds"] + each * distinct, "note": note}


def ask_ledger(folder: Path, tokens: int, ranks: int) -> dict[str, Any]:
    """`tools.ledger RUN --step N`: the rows of three steps of 1,024 samples, and their documents."""
    from training.ledger import SampleLedger, StageSpan
    from training.sections import DataConfig
    from training.state import TrainState

    dataset = _opened_with_pieces(folder)
    steps = len(dataset) // 1024
    stage = StageSpan("all", dataset, DataConfig(), 0, steps, 1024)
    ledger = SampleLedger([stage], TrainState(data_fingerprint="", seed=0, wandb_id=""), [])
    with Peak() as peak:
        found = [len(ledger.of_step(step)) for step in (1, steps // 2, steps)]
    assert found == [1024] * 3
    return peak.result | {"seconds": peak.result["seconds"] / 3, "note": "1,024 rows, a mean of three steps"}


def _files(ranks: int) -> dict[str, tuple[int, str]]:
    kinds = "model_states", "optim_states"
    return {f"zero_pp_rank_{rank}_mp_rank_00_{kind}.pt": (0, DIGEST) for rank in range(ranks) for kind in kinds}


def gather_files(folder: Path, tokens: int, ranks: int) -> dict[str, Any]:
    """Every rank in a save hears from every other which files that wrote (the network not counted)."""
    mine = {"files": dict(list(_files(1).items()))}
    size = len(pickle.dumps(mine))
    with Peak() as peak:
        parts = [pickle.loads(pickle.dumps(mine)) for _ in range(ranks)]
    return peak.result | {"note": f"{size} bytes a rank, {size * len(parts) / 1e6:.1f} MB"}


def _manifest(ranks: int) -> Any:
    from engine.checkpoint.manifest import CheckpointManifest, StateLayout
    from training.state import TrainState

    state = TrainState(data_fingerprint="0", seed=0, wandb_id="0")
    layout = StateLayout(zero_stage=3, world_size=ranks, wrapper="DeepSpeedZeroOptimizer_Stage3", optimizer="FusedAdam")
    facts: dict[str, Any] = {"recipe": {}, "ds_config": {}, "environment": {}, "data": {}}
    return CheckpointManifest(layout=layout, state=state, files=_files(ranks), created="", **facts)


def seal_checkpoint(folder: Path, tokens: int, ranks: int) -> dict[str, Any]:
    """The first rank in a save: all files found, the manifest with its digest, written and renamed."""
    from engine.checkpoint.manifest import MANIFEST, seal
    from storage.atomic import publish, write_atomically

    partial = folder / ".step-00000000.partial"
    partial.mkdir()
    for name in _files(ranks):
        os.close(os.open(partial / name, os.O_CREAT | os.O_WRONLY))
    with Peak() as peak:
        found = [path for path in partial.rglob("*") if path.is_file()]
        assert len(found) == 2 * ranks
        write_atomically(partial / MANIFEST, seal(_manifest(ranks)))
        publish(partial, folder / "step-00000000")
    size = (folder / "step-00000000" / MANIFEST).stat().st_size
    return peak.result | {"note": f"{2 * ranks:,} files, {size / 1e6:.1f} MB"}


def read_checkpoint(folder: Path, tokens: int, ranks: int) -> dict[str, Any]:
    """Whoever continues: the manifest, its digest, and the size of every file (not their content)."""
    from engine.checkpoint.manifest import MANIFEST, CheckpointManifest, _digest_of_fields

    place = folder / "step-00000000"
    with Peak() as peak:
        fields = json.loads((place / MANIFEST).read_bytes())
        assert fields.pop("digest") == _digest_of_fields(fields)
        manifest = CheckpointManifest.model_validate(fields)
        assert all((place / name).stat().st_size == size for name, (size, _) in manifest.files.items())
    return peak.result


STEPS = {
    "data set: written": save_data,
    "data set: pieces written": write_pieces,
    "data set: opened": open_data,
    "data set: shards looked at": look_at_shards,
    "order: made, and half way": make_order,
    "step: rows found": place_step,
    "step: rows dealt": deal_step,
    "step: costs of rows": cost_step,
    "step: costs, by shards": cost_step_by_shards,
    "ledger: a step": ask_ledger,
    "save: files told to all": gather_files,
    "save: index sealed": seal_checkpoint,
    "resume: index read": read_checkpoint,
}


def main() -> None:
    parser = CommandParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("--tokens", type=float, default=1e13, help="of the data set (default: 1e13)")
    parser.add_argument("--ranks", type=int, default=16_384, help="(default: 16384)")
    parser.add_argument("--run", nargs=2, metavar=("STEP", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    tokens, ranks = int(arguments.tokens), arguments.ranks
    if arguments.run:
        print(json.dumps(STEPS[arguments.run[0]](Path(arguments.run[1]), tokens, ranks)))
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in STEPS:
            command = [sys.executable, "-m", "bench.scale", "--run", name, folder]
            command += ["--tokens", str(tokens), "--ranks", str(ranks)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            result = json.loads(done.stdout.splitlines()[-1])
            note, size = result.get("note", ""), result["bytes"] / 1e6
            print(f"{name:<28} {result['seconds']:9.3f} s {size:8.1f} MB   {note}", flush=True)


if __name__ == "__main__":
    main()
