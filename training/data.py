"""From packed rows to the batches of an optimizer step.

1. `open_split` (storage/shards.py) maps the shards; no token is read.
2. `SampleOrder` (training/sampler.py) says which row sample k is, for any k, in constant time and memory.
3. The samples of a step, consumed .. consumed + n - 1, are dealt out to ranks and micro-batches (training/balance.py).
4. `make_batch` widens the rows to int64 and derives targets and positions from the pieces of each row.
5. A `DataLoader` runs 4 here or in worker processes that read ahead; it keeps the order in both cases.

Resume contract: the position of a run (within a stage, see training/stages.py) is the number of samples it has consumed,
nothing else. It is advanced by the training loop after the optimizer step, never here, because this side runs ahead of it.
A loader started at `consumed` continues the sequence exactly and at once, on any number of ranks and workers and with any
micro-batch; only the data (its fingerprint), the seed and the weights must be the same, which is what `SampleOrder.digest`
identifies.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import torch
import xxhash
from torch.utils.data import DataLoader, Dataset

from model.visibility import Visibility
from storage.shards import ShardedDataset
from training.amendments import Amendment
from training.balance import deal, row_costs
from training.batch import Batch
from training.objective import NO_TARGET, Masking
from training.routing import Labels
from training.sampler import Drawn, SampleOrder
from training.sections import DataConfig

LOOKUP_SAMPLES = 4096
"""Samples located at a time: the order costs little per sample only when computed for many."""


def training_order(
    dataset: ShardedDataset,
    config: DataConfig,
    seed: int,
    drawn: Mapping[str, Drawn] | None = None,
    amendments: Sequence[Amendment] = (),
) -> SampleOrder:
    """The order of a run over a split: weights from the recipe if it has any, else from the data.

    `drawn`: what earlier stages have taken of each source (see training/stages.py). `amendments`: what was decided about it.
    """
    weights: Mapping[str, float | None] | None = config.weights
    if weights is None:
        sources = dataset.manifest.splits[dataset.split]
        weights = {name: sources[name].weight for name in dataset.sources}
    return SampleOrder(dataset.rows_per_source, weights, dataset.manifest.fingerprint, seed, drawn, amendments)


class TrainingData(Dataset):
    """Batches by the samples' places and numbers: `data[sources, rows, samples]`, int64 arrays of equal length.

    `visibility`: what the model's tokens see; with it the rows of a step are dealt out by their attention cost. `change`: of
    a batch by the numbers of its samples. `labels`: what rows have by their source. `seed`: rows get seeds of their own by it.
    """

    def __init__(
        self,
        dataset: ShardedDataset,
        order: SampleOrder,
        change: Callable[[Batch, np.ndarray], Batch] | None = None,
        visibility: Visibility | None = None,
        labels: Labels | None = None,
        seed: int | None = None,
    ) -> None:
        self.seed = seed
        self.dataset, self.order, self.change, self.visibility = dataset, order, change, visibility
        self.labels = labels
        self._source = np.array([dataset.sources.index(name) for name in order.sources])

    def __getitem__(self, place: tuple[np.ndarray, np.ndarray, np.ndarray]) -> Batch:
        sources, rows, samples = place
        batch = make_batch(self.dataset, sources, rows, labels=self.labels)
        if self.seed is not None:
            batch["seeds"] = torch.from_numpy(self._seeds(sources, rows, samples))
        if self.change:
            batch = self.change(batch, samples)
        batch["samples"] = torch.from_numpy(samples)
        return batch

    def _seeds(self, sources: np.ndarray, rows: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """By source, row and how often it was read before, whatever else is trained on."""
        names = [self.dataset.sources[source] for source in sources.tolist()]
        parts = zip(names, rows.tolist(), self.order.locate_many(samples)[2].tolist(), strict=True)
        texts = ["\0".join(map(str, (self.seed, *part))) for part in parts]
        return np.array([xxhash.xxh3_64_intdigest(text.encode()) for text in texts], np.uint64).astype(np.int64)

    def places(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source (index into `dataset.sources`) and row of each sample number, int64 [n]."""
        source, row, _ = self.order.locate_many(samples)
        return self._source[source], row


def train_loader(
    data: TrainingData,
    config: DataConfig,
    *,
    consumed: int,
    micro_batch_samples: int,
    accumulation: int,
    world_size: int,
    rank: int,
    pin_memory: bool = False,
) -> Iterator[list[Batch]]:
    """The optimizer steps of one rank after `consumed` samples, without end: `accumulation` micro-batches each."""
    places = _Places(data, consumed, micro_batch_samples, accumulation, world_size, rank)
    batches = iter(_loader(data, places, config, pin_memory))
    while True:
        yield list(islice(batches, accumulation))


def validation_batches(
    dataset: ShardedDataset,
    micro_batch_samples: int,
    world_size: int,
    rank: int,
    max_samples: int | None = None,
    masking: Masking | None = None,
    labels: Labels | None = None,
) -> Iterator[Batch]:
    """Every row once over all ranks, in the order of the files; with `max_samples`, that many rows evenly spread.

    All ranks yield equally many batches of equal size; rows beyond the end have no targets.
    """
    ends = np.cumsum([dataset.rows_per_source[name] for name in dataset.sources])
    total = min(len(dataset), max_samples or len(dataset))
    for first in range(0, total, micro_batch_samples * world_size):
        k = first + rank * micro_batch_samples + np.arange(micro_batch_samples)
        k = k[k < total]
        number = k * len(dataset) // total
        source = np.searchsorted(ends, number, side="right")
        rows = number - np.concatenate([[0], ends])[source]
        batch = make_batch(dataset, source, rows, micro_batch_samples, labels)
        if masking:
            batch = masking(batch, np.pad(number, (0, micro_batch_samples - len(k))))
        yield batch


class _Places:
    """Iterable over the places of a rank's micro-batches: what the DataLoader's sampler is."""

    def __init__(
        self, data: TrainingData, consumed: int, micro_batch: int, accumulation: int, world_size: int, rank: int
    ) -> None:
        self.data, self.consumed, self.rank = data, consumed, rank
        self.layout = (accumulation, world_size, micro_batch)
        self.visibility = data.visibility if world_size > 1 else None

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        accumulation, world_size, micro_batch = self.layout
        step = accumulation * world_size * micro_batch
        ahead = max(1, LOOKUP_SAMPLES // step)  # steps
        consumed = self.consumed
        while True:
            samples = np.arange(consumed, consumed + ahead * step)
            places = zip(*(x.reshape(ahead, step) for x in (*self.data.places(samples), samples)), strict=True)
            for columns in places:
                sources, rows, _ = columns
                order = np.arange(step).reshape(self.layout)
                if self.visibility is not None:
                    costs = row_costs(self.data.dataset, sources, rows, self.visibility)
                    order = deal(costs, micro_batch, world_size)
                for chosen in order[:, self.rank]:
                    yield tuple(column[chosen] for column in columns)
            consumed += ahead * step


def _loader(data: TrainingData, places: _Places, config: DataConfig, pin_memory: bool) -> DataLoader:
    return DataLoader(
        data,
        batch_size=None,
        sampler=places,
        num_workers=config.num_workers,
        prefetch_factor=config.prefetch_batches if config.num_workers else None,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        worker_init_fn=_obey_only_the_parent,
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _obey_only_the_parent(_worker: int) -> None:
    """Signals that reach the whole job are for the training process, which saves first and then ends its workers."""
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def wait() -> None:
        while signal.sigwaitinfo(signals).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def make_batch(
    dataset: ShardedDataset,
    sources: np.ndarray,
    rows: np.ndarray,
    size: int | None = None,
    labels: Labels | None = None,
) -> Batch:
    """Read rows (as `dataset.find` names them) into a batch of `size` rows, the missing ones being padding.

    A token is a target of the one before it if both lie in the same piece and it is not overlap context; where the rows
    say which tokens carry loss, those alone. `labels`: what rows have by their source.
    """
    size, T = size or len(rows), dataset.manifest.seq_length
    inputs, targets = np.empty((size, T), np.int64), np.empty((size, T), np.int64)
    spans: list[int] = []  # tokens of each piece or padding, within the inputs
    num_targets = 0
    for ids_out, targets_out, source, row in zip(inputs, targets, sources.tolist(), rows.tolist(), strict=False):
        block, j = dataset.find(source, row)
        ids = block.ids[j]
        ids_out[:] = ids[:-1]
        targets_out[:] = ids[1:]
        begin, end = block.splits[j : j + 2].tolist()
        at = possible = 0
        for length, context in zip(block.seg_len[begin:end].tolist(), block.seg_ctx[begin:end].tolist(), strict=True):
            first = at + (context or 1)  # token that is the first target
            targets_out[at - 1 if at else 0 : first - 1] = NO_TARGET
            spans.append(min(length, T - at))
            at += length
            possible += at - first
        if at <= T:
            targets_out[at - 1 :] = NO_TARGET
            spans.append(T - at)
        carrying = block.spans(j)
        num_targets += possible if carrying is None else _keep(targets_out, carrying)
    if len(rows) < size:
        inputs[len(rows) :] = dataset.manifest.tokenizer.pad_id
        targets[len(rows) :] = NO_TARGET
        spans += [T] * (size - len(rows))
    ramp = _ramp(T)
    positions = np.concatenate([ramp[:n] for n in spans]).reshape(size, T)
    batch: Batch = {
        "input_ids": torch.from_numpy(inputs),
        "position_ids": torch.from_numpy(positions),
        "targets": torch.from_numpy(targets),
        "num_targets": num_targets,
    }
    if labels and labels.adapters is not None:
        batch["adapters"] = torch.from_numpy(np.pad(labels.adapters[sources], (0, size - len(rows))))
    if labels and labels.sources is not None:
        batch["sources"] = torch.from_numpy(np.pad(labels.sources[sources], (0, size - len(rows))))
    return batch


def _keep(targets: np.ndarray, spans: np.ndarray) -> int:
    """Take the targets [T] of a row away but for those at the tokens of `spans` [spans, 2]; returns their number."""
    at = 0
    for begin, end in (spans - 1).tolist():  # a token is the target of the one before it
        targets[at:begin] = NO_TARGET
        at = end
    targets[at:] = NO_TARGET
    return int((spans[:, 1] - spans[:, 0]).sum())


@lru_cache(maxsize=4)
def _ramp(n: int) -> np.ndarray:
    return np.arange(n)
