"""The readers that `bench.loader` measures."""

import datetime
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import torch
from datasets import load_from_disk
from torch.utils.data import DistributedSampler

from data_prep.pack import pack, write_split
from storage.manifest import Manifest, PackingPolicy, SourceRows, TokenizerInfo
from storage.shards import ShardedDataset, ShardWriter, open_split, write_manifest
from training.data import TrainingData, make_batch, train_loader, training_order
from training.sections import DataConfig

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
    write_manifest(directory, small.model_copy(update={"splits": {"train": {"random": entry}}}))


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
