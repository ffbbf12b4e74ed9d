"""Decisions about an order: what is left out never comes, everything else comes once, and a stretch in another order."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from training.amendments import LeaveOut, Reorder, amended, original, passed
from training.sampler import SampleOrder

left_out = st.lists(st.integers(0, 60), min_size=1, max_size=12).map(LeaveOut)
stretches = st.tuples(st.integers(0, 40), st.integers(1, 30), st.integers(0, 9))
reordered = stretches.map(lambda s: Reorder(s[0], s[0] + s[1], s[2]))
amendments = st.lists(left_out | reordered, max_size=5)


@given(amendments)
def test_numbers_lead_back_and_forth(amendments):
    numbers = np.arange(300)
    before = original(numbers, amendments)
    assert len(set(before.tolist())) == len(before)
    np.testing.assert_array_equal(amended(before, amendments), numbers)
    gone = sorted(set(range(200)) - set(before.tolist()))
    assert (amended(np.array(gone, np.int64), amendments) == -1).all()


@given(st.lists(left_out, max_size=4), st.integers(0, 200))
def test_what_was_passed_is_used_or_left_out(amendments, count):
    used = set(original(np.arange(count), amendments).tolist())
    front = passed(count, amendments)
    assert used <= set(range(front))
    assert (amended(np.array(sorted(set(range(front)) - used), np.int64), amendments) == -1).all()


@given(amendments, st.integers(0, 5))
def test_an_order_without_the_left_out_rows(amendments, seed):
    plain = SampleOrder({"a": 70, "b": 30}, {}, "data", seed)
    changed = SampleOrder({"a": 70, "b": 30}, {}, "data", seed, amendments=amendments)
    numbers = original(np.arange(200), amendments)
    for ours, theirs in zip(changed.locate_many(np.arange(200)), plain.locate_many(numbers), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert (changed.digest == plain.digest) == (not amendments)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(60, 120), st.integers(0, 5))
def test_a_later_stage_does_not_bring_back_what_was_left_out(samples, used, seed):
    rows = {"a": 400, "b": 200}
    first = SampleOrder(rows, {}, "data", seed, amendments=[LeaveOut(samples)])
    then = SampleOrder(rows, {"a": 1.0, "b": 1.0}, "data", seed, first.drawn_after(used))
    seen = {first.locate(k) for k in range(used)}
    gone = {SampleOrder(rows, {}, "data", seed).locate(k) for k in samples}
    assert not gone & seen
    assert not (gone | seen) & {then.locate(k) for k in range(200)}
