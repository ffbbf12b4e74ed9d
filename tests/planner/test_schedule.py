"""A pipeline that is played through takes as long as formulas and a count of the work say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.layout.schedule import instructions
from planner.schedule import play

SIZES = st.tuples(st.integers(2, 6), st.integers(1, 12))  # stages, micro-batches


@given(SIZES, st.floats(0.1, 10), st.floats(0.1, 10))
def test_equal_stages_wait_for_what_1f1b_is_known_for(sizes, forward, backward):
    """Narayanan et al. 2021, section 2.2: (p - 1) / m of the ideal time, so (p - 1) / (m + p - 1) of all of it."""
    stages, micro_batches = sizes
    seconds = {"ForwardPass": forward, "BackwardPass": backward}
    result = play(instructions(*sizes), lambda stage, name, micro: seconds[name], lambda name: 0.0)
    assert result.end == pytest.approx((micro_batches + stages - 1) * (forward + backward))
    for computed in result.computed:
        assert 1 - computed / result.end == pytest.approx((stages - 1) / (micro_batches + stages - 1))


@given(SIZES, st.data())
def test_on_one_processor_everything_adds_up(sizes, data):
    work = {}

    def drawn(stage, name, micro):
        return work.setdefault((stage, name, micro), data.draw(st.floats(0.01, 5)))

    result = play(instructions(*sizes), drawn, lambda name: 0.0, processors=1.0)
    assert len(work) == 2 * sizes[0] * sizes[1]
    assert result.end == pytest.approx(sum(work.values()))


@given(SIZES, st.data())
def test_it_takes_no_less_than_any_stage_or_any_micro_batch_needs_and_no_more_than_all_in_turn(sizes, data):
    stages, micro_batches = sizes
    passes = [(name, micro) for name in ("ForwardPass", "BackwardPass") for micro in range(micro_batches)]
    work = {(stage, *each): data.draw(st.floats(0.01, 5)) for stage in range(stages) for each in passes}
    sent = data.draw(st.floats(0, 2))
    result = play(instructions(*sizes), lambda *key: work[key], lambda name: sent)
    for stage in range(stages):
        assert result.end >= sum(work[stage, *each] for each in passes) - 1e-6
    for micro in range(micro_batches):
        through = sum(work[stage, name, micro] for stage in range(stages) for name in ("ForwardPass", "BackwardPass"))
        assert result.end >= through + 2 * (stages - 1) * sent - 1e-6
    assert result.end <= sum(work.values()) + 2 * (stages - 1) * micro_batches * sent + 1e-6
    faster = play(instructions(*sizes), lambda *key: work[key] / 2, lambda name: sent / 2)
    assert faster.end == pytest.approx(result.end / 2, abs=1e-6)


def test_two_stages_by_hand():
    """F0 send F1 B1 send B0: one micro-batch passes through both, there and back."""
    seconds = {(0, "ForwardPass"): 1.0, (1, "ForwardPass"): 2.0, (1, "BackwardPass"): 4.0, (0, "BackwardPass"): 8.0}
    result = play(instructions(2, 1), lambda stage, name, micro: seconds[stage, name], lambda name: 0.5)
    assert result.end == pytest.approx(1 + 0.5 + 2 + 4 + 0.5 + 8)
    assert result.computed == pytest.approx([9, 6])
    assert result.exchanged == pytest.approx([1, 1])
    twice = play(instructions(2, 1), lambda stage, name, micro: seconds[stage, name], lambda name: 0.5, alone=2.0)
    assert twice.end == pytest.approx((1 + 2 + 4 + 8) / 2 + 1), "one waits whenever the other computes"


@given(SIZES, st.floats(1, 3))
def test_who_computes_alone_is_faster_and_nobody_else(sizes, alone):
    of = [play(instructions(*sizes), lambda *key: 1.0, lambda name: 0.0, alone=speed) for speed in (1.0, alone)]
    assert of[0].end / alone - 1e-6 <= of[1].end <= of[0].end + 1e-6
    if sizes[0] == 1:
        assert of[1].end == pytest.approx(of[0].end)
