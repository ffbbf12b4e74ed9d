"""Where samples come from and go to, both ways."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.shards import open_split
from tests.training.corpus import build
from training.amendments import LeaveOut, Reorder
from training.decisions import Decision, SampleLeftOut
from training.ledger import SampleLedger, StageSpan
from training.sampler import SampleOrder
from training.sections import DataConfig
from training.state import TrainState

ROWS = st.dictionaries(st.sampled_from("abc"), st.integers(1, 500), min_size=1)


@given(ROWS, st.integers(0, 9), st.integers(0, 3000), st.lists(st.integers(0, 100), max_size=6), st.booleans())
def test_every_sample_is_found_by_its_row_and_epoch(rows, seed, used, left_out, reorder):
    amendments = [LeaveOut(left_out)] if left_out else []
    amendments += [Reorder(20, 60, 1)] if reorder else []
    first = SampleOrder(rows, {}, "data", seed)
    for order in (first, SampleOrder(rows, {}, "data", seed, first.drawn_after(used), amendments)):
        numbers = np.arange(0, 4000, 37)
        for k, source, row, epoch in zip(
            numbers.tolist(), *(c.tolist() for c in order.locate_many(numbers)), strict=True
        ):
            assert order.find(order.sources[source], row, epoch) == k
    for k in left_out:
        taken = SampleOrder(rows, {}, "data", seed).locate(k)
        assert SampleOrder(rows, {}, "data", seed, amendments=[LeaveOut(left_out)]).find(*taken) is None


def test_in_constant_time_among_many_rows():
    """Each is a computation, so a billion rows cost what a hundred do."""
    order = SampleOrder({"a": 10**9, "b": 3 * 10**8}, {"a": 0.9, "b": 0.1}, "data", 1)
    numbers = np.array([0, 10**6, 10**9, 5 * 10**9])
    for k, source, row, epoch in zip(numbers.tolist(), *(c.tolist() for c in order.locate_many(numbers)), strict=True):
        assert order.find(order.sources[source], row, epoch) == k


@pytest.fixture(scope="module")
def ledger(tmp_path_factory) -> SampleLedger:
    """Two stages over one data set, of which the first is done, with a decision and a change of the batch."""
    folder = tmp_path_factory.mktemp("ledger")
    rng = np.random.default_rng(0)
    build(folder, {"a": rng.integers(20, 200, 30).tolist(), "b": rng.integers(4, 60, 40).tolist()}, 64)
    dataset = open_split(folder, "train")
    place = SampleOrder(dataset.rows_per_source, {}, dataset.manifest.fingerprint, 4).locate(17)
    gone = SampleLeftOut(sample=17, source=place[0], row=place[1], epoch=place[2], documents=[])
    decision = Decision(step=3, action="leave_out", reason="loss", checkpoint=2, samples=[gone])
    state = TrainState(data_fingerprint="f", seed=4, wandb_id="w", step=5, batches=[(2, 8, 512), (3, 4, 256)])
    first, second = (
        StageSpan("short", dataset, DataConfig(), 0, 5, 4),
        StageSpan("long", dataset, DataConfig(), 5, 40, 4),
    )
    return SampleLedger([first, second], state, [decision])


def test_both_ways_agree(ledger):
    uses = [use for step in range(1, ledger.steps + 1) for use in ledger.of_step(step)]
    assert [use.step for use in uses] == [1] * 8 + [2] * 8 + [step for step in range(3, 41) for _ in range(4)]
    dataset = ledger.stages[0].dataset
    by_row = {}
    for use in uses:
        by_row.setdefault((use.source, use.row), []).append(use)
    for source, rows in dataset.rows_per_source.items():
        for row in range(rows):
            assert list(ledger.of_row(dataset, source, row)) == by_row.get((source, row), [])


def test_nothing_comes_twice_in_an_epoch_and_what_was_left_out_does_not_come(ledger):
    uses = [use for step in range(1, ledger.steps + 1) for use in ledger.of_step(step)]
    places = [(use.source, use.row, use.epoch) for use in uses]
    assert len(set(places)) == len(places)
    gone = ledger.decisions[0].samples[0]
    assert (gone.source, gone.row, gone.epoch) not in places


def test_a_step_that_is_not_there(ledger):
    with pytest.raises(ValueError, match="the run has the steps 1 to 40, not 41"):
        ledger.of_step(41)
