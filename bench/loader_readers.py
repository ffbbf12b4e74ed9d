"""The readers that `bench.loader` measures."""

import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import psutil
import pyarrow as pa
import torch
from datasets import load_from_disk
from torch.utils.data import DistributedSampler

from data_prep.pack import pack, write_split
from storage.documents import rows_of, write_manifest
from storage.lookup import RUN, write_lookup
from storage.manifest import Manifest, PackingPolicy, SourceRows, TokenizerInfo, save_manifest
from storage.shards import ShardedDataset, ShardWriter, open_split
from training.data import TrainingData, make_batch, train_loader, training_order
from training.ledger import SampleLedger, StageSpan
from training.sections import DataConfig
from training.state import TrainState

SEQ_LENGTH, BATCH_ROWS, ROUNDS, SAMPLES = 4096, 8, 30, 512
TARGET_RATIO, TARGET_SECONDS = 1.5, 1.0
INDEX_ROWS, SHARD_ROWS = 10**9, 32 * 1024

Batches = list[np.ndarray]
"""Row numbers of each, int64 [8]."""


class RandomDocuments:
    """Documents of log-normal length (median about 1,100 tokens) cut from one random stream."""

    def __init__(self, tokens: int) -> None:
        generator = np.random.default_rng(0)
        lengths = np.maximum(2, generator.lognormal(7, 1.3, tokens // 2000)).astype(np.int64)
        self.length = lengths[: int(np.searchsorted(np.cumsum(lengths), tokens))]
        self.doc = np.arange(len(self.length))
        self.stream = generator.integers(4, 32000, int(self.length.max()) * 2).astype(np.uint16)

    def tokens(self, i: int) -> np.ndarray:
        first = i % 1000
        return self.stream[first : first + int(self.length[i])]


def write_data(directory: Path, rows: int, seq_length: int) -> Manifest:
    documents, policy = RandomDocuments(rows * seq_length), PackingPolicy(seq_length=seq_length)
    packing = pack(documents.length, policy.row_tokens, policy, 0)
    writer = ShardWriter(directory, "train", "random", policy.row_tokens, "uint16")
    tokens = int(documents.length.sum())
    entry = SourceRows(
        documents=len(documents.doc),
        bytes=4 * tokens,
        tokens=tokens,
        rows=packing.rows,
        targets=packing.targets,
        shards=write_split(documents, packing, writer, pad_id=3),
    )
    return write_manifest(directory, manifest_of(policy, entry))


def manifest_of(policy: PackingPolicy, entry: SourceRows) -> Manifest:
    """Of a data set with one source, for any tokenizer."""
    tokenizer = TokenizerInfo(
        type="sentencepiece",
        file="tokenizer.model",
        sha256="0" * 64,
        vocab_size=32000,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        mask_id=None,
    )
    return Manifest(
        created_at=datetime.datetime.now(datetime.UTC).isoformat(),
        created_by={"longform": "bench"},
        inputs={"random": "0" * 64},
        tokenizer=tokenizer,
        dtype="uint16",
        packing=policy,
        seed=0,
        splits={"train": {"random": entry}},
    )


def contenders(directory: Path, dataset: ShardedDataset) -> dict[str, Callable[[Batches], None]]:
    """Each takes batches of row numbers and makes int64 input_ids [8, T] of them, some also targets and positions."""
    flat = directory / "rows.bin"
    with flat.open("wb") as file:
        for _, block in dataset.blocks("random"):
            block.ids.tofile(file)
    memmap = np.memmap(flat, np.uint16, "r").reshape(-1, SEQ_LENGTH + 1)
    plain = np.asarray(memmap)  # indexing a memmap costs more than indexing an array
    arrow = load_from_disk(str(directory / "train")).select_columns(["input_ids"]).with_format("torch")
    buffer = np.empty((BATCH_ROWS, SEQ_LENGTH), np.int64)
    source = np.zeros(BATCH_ROWS, np.int64)
    data = TrainingData(dataset, training_order(dataset, DataConfig(), 0))

    def bare(batches: Batches) -> None:
        for rows in batches:
            for i, row in enumerate(rows.tolist()):
                buffer[i] = plain[row, :-1]

    def ids_only(batches: Batches) -> None:
        for rows in batches:
            batch = np.empty((BATCH_ROWS, SEQ_LENGTH), np.int64)
            for i, row in enumerate(rows.tolist()):
                block, j = dataset.find(0, row)
                batch[i] = block.ids[j, :-1]
            torch.from_numpy(batch)

    def with_targets(batches: Batches) -> None:
        for rows in batches:
            make_batch(dataset, source, rows)

    steps = train_loader(
        data, DataConfig(), consumed=0, micro_batch_samples=BATCH_ROWS, accumulation=1, world_size=1, rank=0
    )

    def loader(batches: Batches) -> None:
        for _ in islice(steps, len(batches)):
            pass

    def stacked(batches: Batches) -> None:
        for rows in batches:
            torch.stack([torch.from_numpy(memmap[row, :-1].astype(np.int64)) for row in rows.tolist()])

    def one_by_one(batches: Batches) -> None:
        for rows in batches:
            torch.stack([arrow[row]["input_ids"][:-1] for row in rows.tolist()])

    def by_batch(batches: Batches) -> None:
        for rows in batches:
            arrow[rows.tolist()]["input_ids"][:, :-1].contiguous()

    return {
        "bare copy uint16 -> int64, reused buffer": bare,
        "this reader: input_ids": ids_only,
        "this reader: input_ids, targets, position_ids": with_targets,
        "this loader: order, batches, DataLoader, one process": loader,
        "numpy memmap, row to tensor, stack": stacked,
        "datasets[i], torch format, stack": one_by_one,
        "datasets[rows], torch format": by_batch,
    }


def measure(directory: Path, dataset: ShardedDataset) -> dict[str, float]:
    """Fastest round of each contender, in CPU microseconds a sample."""
    best: dict[str, float] = {}
    named = contenders(directory, dataset)
    generator = np.random.default_rng(1)
    for _ in range(ROUNDS):
        batches = list(generator.integers(0, len(dataset), (SAMPLES // BATCH_ROWS, BATCH_ROWS)))
        for name, read in named.items():
            started = time.process_time()
            read(batches)
            seconds = time.process_time() - started
            best[name] = min(best.get(name, seconds), seconds)
    return {name: seconds / SAMPLES * 1e6 for name, seconds in best.items()}


def write_index(directory: Path, rows: int) -> None:
    """A manifest of `rows` rows: one shard's file, listed as often as needed."""
    small = write_data(directory, SHARD_ROWS + 1024, seq_length=8)
    shard = small.splits["train"]["random"].shards[0]
    assert shard.rows >= SHARD_ROWS
    shards = [shard] * max(1, rows // shard.rows)
    entry = small.splits["train"]["random"].model_copy(update={"shards": shards, "rows": shard.rows * len(shards)})
    save_manifest(directory, small.model_copy(update={"splits": {"train": {"random": entry}}}))


def write_documents(directory: Path) -> list[int]:
    """The index of a document a row, in order. Of all runs but the middle one only the ends are there; documents of that one."""
    dataset = open_split(directory, "train", verify="none")
    file = directory / "train/documents-random.arrow"
    write_lookup(file, dataset.manifest.splits["train"]["random"].shards_hash, ())
    schema = pa.ipc.open_stream(file).schema
    runs = -(-len(dataset) // RUN)
    ends = np.arange(runs)[:, None] * RUN + [0, RUN - 1]
    ends[-1, 1] = len(dataset) - 1
    with file.open("wb") as output, pa.ipc.new_stream(_WithHoles(output), schema) as stream:
        for number, (first, last) in enumerate(ends.tolist()):
            column = np.zeros(last - first + 1, np.int64)
            column[[0, -1]] = first, last
            if number == runs // 2:
                column = np.arange(first, last + 1)
            stream.write_batch(pa.record_batch([pa.array(column.view(np.uint64)), pa.array(column)], schema=schema))
        stream.write_batch(pa.record_batch([pa.array([], kind) for kind in schema.types], schema=schema))
    first, last = ends[runs // 2].tolist()
    return np.random.default_rng(0).integers(first, last, 20).tolist()


class _WithHoles:
    """A file in which long stretches of zeros take no room."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def write(self, data: bytes) -> int:
        if len(data) % 8 or len(filled := np.flatnonzero(np.frombuffer(data, np.uint64))) > len(data) // 16:
            return self.file.write(data)
        begin = self.file.tell()
        self.file.truncate(begin + len(data))
        for place in filled.tolist():
            self.file.seek(begin + 8 * place)
            self.file.write(data[8 * place : 8 * place + 8])
        return self.file.seek(begin + len(data)) - begin

    def flush(self) -> None:
        self.file.flush()


def ledger_answers(words: str) -> dict[str, float]:
    """Open a run's data in this process and answer for documents, and for three steps of 1,024 rows."""
    directory, *documents = words.split()
    _forget(Path(directory) / "train/documents-random.arrow")
    before, started = psutil.Process().memory_info().rss, time.perf_counter()
    dataset = open_split(Path(directory), "train", verify="none")
    steps = 3 * len(dataset) // 1024
    stage = StageSpan("all", dataset, DataConfig(), 0, steps, 1024)
    ledger = SampleLedger([stage], TrainState(data_fingerprint="", seed=0, wandb_id=""), [])
    opened = time.perf_counter()
    for document in documents:
        (row,) = rows_of(dataset, "random", int(document))
        assert len(list(ledger.of_row(dataset, "random", row))) == 3
    asked = time.perf_counter()
    for step in (1, steps // 2, steps):
        ledger.of_step(step)
    ended = time.perf_counter()
    each = {"document_ms": (asked - opened) / len(documents) * 1e3, "step_ms": (ended - asked) / 3 * 1e3}
    return figures(len(dataset), started, before) | each


def _forget(file: Path) -> None:
    """Let what the system holds of a file be read anew."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def first_batch(directory: str) -> dict[str, float]:
    """Open, order and read one batch in this process."""
    before, started = psutil.Process().memory_info().rss, time.perf_counter()
    dataset = open_split(Path(directory), "train", verify="none")
    opened = time.perf_counter()
    data = TrainingData(dataset, training_order(dataset, DataConfig(), 0))
    consumed = len(dataset) // 2 // 64 * 64
    next(
        train_loader(
            data, DataConfig(), consumed=consumed, micro_batch_samples=BATCH_ROWS, accumulation=1, world_size=8, rank=3
        )
    )
    return figures(len(dataset), started, before) | {"open_seconds": opened - started}


def first_indices(rows: str) -> dict[str, float]:
    """The same of torch's sampler over so many rows."""
    before, started = psutil.Process().memory_info().rss, time.perf_counter()
    numbers = range(int(rows))
    next(iter(DistributedSampler(numbers, num_replicas=8, rank=3)))  # type: ignore[arg-type]  # it asks for the length
    return figures(int(rows), started, before)


def figures(rows: int, started: float, before: int) -> dict[str, float]:
    seconds = time.perf_counter() - started
    return {"rows": rows, "seconds": seconds, "megabytes": (psutil.Process().memory_info().rss - before) / 1e6}


def in_fresh_process(function: Callable, argument: object) -> dict[str, float]:
    """The fastest of three runs."""
    call = f"readers.{function.__name__}({str(argument)!r})"
    code = f"import json; from bench import loader_readers as readers; print(json.dumps({call}))"
    run = partial(subprocess.run, [sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return min((json.loads(run().stdout) for _ in range(3)), key=lambda figures: figures["seconds"])
