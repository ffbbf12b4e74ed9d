"""Batches equal their slow definition, and the sequence of samples survives every change of layout."""

import os
import signal
import subprocess
import sys
from itertools import islice, product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from storage.shards import open_split
from tests.properties import examples
from tests.training.corpus import PAD, build
from training.data import NO_TARGET, TrainingData, train_loader, training_order, validation_batches
from training.sections import DataConfig

STEP_SAMPLES = 12
IN_PROCESS = DataConfig()
LAYOUTS = [(1, 12), (1, 3), (2, 6), (2, 1), (3, 2), (4, 3), (6, 1), (12, 1)]  # world size, micro-batch


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> TrainingData:
    directory = tmp_path_factory.mktemp("data")
    lengths = {"books": list(range(1, 90)), "web": [5, 9, 17, 30] * 20}
    build(directory, lengths, seq_length=16, overlap=3, weights={"books": 3.0, "web": 1.0})
    dataset = open_split(directory, "train")
    return TrainingData(dataset, training_order(dataset, DataConfig(), seed=5))


def steps(data: TrainingData, first: int, count: int, world: int, micro_batch: int, config=IN_PROCESS) -> list:
    """`count` optimizer steps from step `first` on: per step, the sorted rows that all ranks saw together."""
    seen: list[list] = [[] for _ in range(count)]
    for rank in range(world):
        loader = train_loader(
            data,
            config,
            consumed=first * STEP_SAMPLES,
            micro_batch_samples=micro_batch,
            accumulation=STEP_SAMPLES // world // micro_batch,
            world_size=world,
            rank=rank,
        )
        for rows, batches in zip(seen, islice(loader, count), strict=False):
            rows += [tuple(row.tolist()) for batch in batches for row in batch["input_ids"]]
    return [sorted(rows) for rows in seen]


def slow_batch(dataset, source: str, row: int) -> tuple[list, list, list]:
    ids, seg_len, seg_ctx, _, _ = dataset.row(source, row)
    T = len(ids) - 1
    positions, targets, at = [], [NO_TARGET] * T, 0
    for length, context in zip(seg_len.tolist(), seg_ctx.tolist(), strict=True):
        positions += range(length)
        for i in range(at + max(context, 1), at + length):
            targets[i - 1] = int(ids[i])
        at += length
    positions += range(T + 1 - at)
    return ids[:T].tolist(), positions[:T], targets


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=40),
    st.integers(1, 20),
    st.integers(1, 20),
    st.sampled_from(["bestfit", "concat"]),
    st.integers(1, 5),
)
@examples(60)
def test_batches_equal_their_definition(tmp_path_factory, lengths, seq_length, overlap, policy, size):
    directory = tmp_path_factory.mktemp("definition")
    overlap = min(overlap, seq_length) if policy == "bestfit" else 1
    build(directory, {"books": lengths}, seq_length, policy=policy, overlap=overlap, splits=["validation"])
    dataset = open_split(directory, "validation")
    rows = 0
    for batch in validation_batches(dataset, size, world_size=1, rank=0):
        assert all(batch[name].shape == (size, seq_length) for name in ("input_ids", "position_ids", "targets"))
        assert all(batch[name].dtype == torch.int64 for name in ("input_ids", "position_ids", "targets"))
        assert batch["num_targets"] == (batch["targets"] != NO_TARGET).sum()
        for i in range(size):
            if rows < len(dataset):
                expected = slow_batch(dataset, "books", rows)
            else:
                expected = [PAD] * seq_length, list(range(seq_length)), [NO_TARGET] * seq_length
            got = tuple(batch[name][i].tolist() for name in ("input_ids", "position_ids", "targets"))
            assert got == tuple(expected)
            rows += 1
    assert rows >= len(dataset)


def test_every_layout_sees_the_same_samples_in_each_step(data):
    expected = steps(data, 0, 20, *LAYOUTS[0])
    assert len({tuple(step) for step in expected}) == 20
    for layout in LAYOUTS[1:]:
        assert steps(data, 0, 20, *layout) == expected


@given(st.integers(0, 10**9), st.lists(st.tuples(st.sampled_from(LAYOUTS), st.integers(1, 4)), min_size=1, max_size=5))
@examples(25)
def test_a_run_resumed_in_other_layouts_continues_the_sequence(data, first, legs):
    total = sum(count for _, count in legs)
    expected = steps(data, first, total, *LAYOUTS[0])
    resumed = []
    for (world, micro_batch), count in legs:
        resumed += steps(data, first + len(resumed), count, world, micro_batch)
    assert resumed == expected


def test_workers_keep_the_order_and_reading_ahead_loses_nothing(data):
    expected = steps(data, 0, 12, 2, 3)
    for workers, prefetch in ((1, 1), (2, 8)):
        config = DataConfig(num_workers=workers, prefetch_batches=prefetch)
        stopped = steps(data, 0, 5, 2, 3, config)
        assert stopped + steps(data, 5, 7, 2, 3, config) == expected


def test_workers_give_the_same_batches_in_the_same_order(data):
    layout = {"consumed": 24, "micro_batch_samples": 2, "accumulation": 3, "world_size": 2, "rank": 1}
    here = islice(train_loader(data, DataConfig(), **layout), 6)
    there = islice(train_loader(data, DataConfig(num_workers=2), **layout), 6)
    for one, other in zip(here, there, strict=True):
        assert len(one) == len(other) == 3
        for a, b in zip(one, other, strict=True):
            assert a["num_targets"] == b["num_targets"]
            assert all(torch.equal(a[name], b[name]) for name in ("input_ids", "position_ids", "targets"))


def test_starting_far_into_a_run_reads_only_what_is_asked_for(data, monkeypatch):
    found = []
    find = type(data.dataset).find
    monkeypatch.setattr(type(data.dataset), "find", lambda *place: found.append(place) or find(*place))
    steps(data, 10**12, 2, 1, 12)
    assert len(found) == 2 * STEP_SAMPLES


def test_weights_come_from_the_recipe_else_from_the_data(data):
    dataset = data.dataset
    by_data = training_order(dataset, DataConfig(), 5).locate_many(np.arange(4096))[0]
    assert np.bincount(by_data).tolist() == [3072, 1024]
    by_recipe = training_order(dataset, DataConfig(weights={"books": 1, "web": 1}), 5).locate_many(np.arange(4096))[0]
    assert np.bincount(by_recipe).tolist() == [2048, 2048]
    only = TrainingData(dataset, training_order(dataset, DataConfig(weights={"books": 0, "web": 1}), 5))
    assert set(only.places(np.arange(100))[0].tolist()) == {dataset.sources.index("web")}


def test_validation_sees_every_row_once_whatever_the_world(data):
    dataset = data.dataset
    for (world, micro_batch), limit in product([(1, 1), (1, 7), (2, 3), (3, 4), (5, 9)], (None, 1, 23, 10**6)):
        ranks = [list(validation_batches(dataset, micro_batch, world, rank, limit)) for rank in range(world)]
        assert len({len(batches) for batches in ranks}) == 1
        assert all(batch["input_ids"].shape == (micro_batch, 16) for batches in ranks for batch in batches)
        order = [row for group in zip(*ranks, strict=True) for batch in group for row in rows_with_targets(batch)]
        everything = [row for batch in validation_batches(dataset, 1, 1, 0, limit) for row in rows_with_targets(batch)]
        assert order == everything
        if limit is None or limit > len(dataset):
            entries = dataset.manifest.splits["train"].values()
            assert sum(b["num_targets"] for rank in ranks for b in rank) == sum(entry.targets for entry in entries)


def rows_with_targets(batch) -> list[tuple]:
    rows = zip(batch["input_ids"].tolist(), batch["targets"].tolist(), strict=True)
    return [(*ids, *targets) for ids, targets in rows if set(targets) != {NO_TARGET}]


STOPPED_BY_SIGNAL = """
import signal, sys
from itertools import islice
from training.data import TrainingData, train_loader, training_order
from training.sections import DataConfig
from storage.shards import open_split

def main():
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    dataset = open_split(sys.argv[1], "train")
    data = TrainingData(dataset, training_order(dataset, DataConfig(), 5))
    loader = train_loader(
        data, DataConfig(num_workers=2), consumed=0, micro_batch_samples=2, accumulation=2, world_size=1, rank=0
    )
    for step, batches in enumerate(islice(loader, 40)):
        if step == 3:
            print("signal", flush=True)
            while not stopped:
                signal.pause()
    print(step, stopped)

main()
"""


def test_a_signal_to_the_group_leaves_the_workers_to_the_training_process(data):
    command = [sys.executable, "-c", STOPPED_BY_SIGNAL, str(data.dataset.directory)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, start_new_session=True, text=True, **streams) as process:
        assert process.stdout.readline() == "signal\n"
        os.killpg(process.pid, signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (0, "39 [True]\n", "")
