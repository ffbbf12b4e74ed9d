"""The times of a run add up, whatever it does and whenever it is killed."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.goodput import (
    BETWEEN,
    DATA,
    GOODPUT_FILE,
    KINDS,
    REWIND,
    SAVE,
    UPDATE,
    VALIDATION,
    Goodput,
    PhaseClock,
    read_times,
    share_of,
)

EXACT = {"rel": 1e-9, "abs": 1e-6}


class Time:
    """Passes only when it is told to."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


durations = st.floats(0, 1000)
steps = st.tuples(durations, durations, st.lists(st.sampled_from([VALIDATION, SAVE, REWIND]), max_size=2), durations)
"""Wait, update, what is done aside after it, and how long each of these takes."""
launches = st.lists(
    st.tuples(
        st.tuples(durations, durations, durations),  # nothing runs, launcher alone, imports
        st.lists(steps, max_size=6),
        st.sampled_from(["killed", "failed in a step", "stopped"]),
        st.integers(0, 6),  # steps that the next launch does again
    ),
    min_size=1,
    max_size=4,
)


@given(launches, st.booleans())
def test_kinds_add_up_to_the_wall_time(tmp_path_factory, history, always_kept):
    run, time = tmp_path_factory.mktemp("run"), Time()
    first, step, furthest, first_passes, redone, kept = None, 0, 0, 0.0, 0, 0.0
    for (idle, launcher, imports), taken, end, lost in history:
        time.now += idle
        began, heard_before = time.now, kept
        first = began if first is None else first
        time.now += launcher + imports
        clock = PhaseClock(time)
        time.now += 1.0
        goodput = Goodput(run, clock, step, [began, began + launcher], wall=time)
        kept, furthest_kept, passes_kept, redone_kept = time.now, furthest, first_passes, redone
        before = sum(goodput.times.seconds.values())
        assert before == pytest.approx(time.now - first, **EXACT)
        assert goodput.times.launches[-1].seconds["restart"] == pytest.approx(
            began - heard_before if heard_before else 0, **EXACT
        )
        for wait, update, asides, aside in taken:
            clock.enter(DATA)
            time.now += wait
            clock.enter(UPDATE)
            time.now += update
            clock.enter(BETWEEN)
            step += 1
            goodput.step_done(step)
            again = step <= furthest
            redone += again
            first_passes += update * (not again)
            furthest = max(furthest, step)
            for phase in asides:
                with clock.aside(phase):
                    time.now += aside
            if always_kept:
                goodput.keep()
                kept, furthest_kept, passes_kept, redone_kept = time.now, furthest, first_passes, redone
        if end == "killed":
            furthest, first_passes, redone = furthest_kept, passes_kept, redone_kept
            time.now += 5.0
        else:
            if end == "failed in a step":
                clock.enter(UPDATE)
                time.now += 3.0
            goodput.close(None if end.startswith("failed") else 75)
            kept = time.now
        times = read_times(run)
        assert sum(times.seconds.values()) == pytest.approx(kept - first, **EXACT)
        assert times.seconds["productive"] == pytest.approx(first_passes, **EXACT)
        assert sum(launch.recomputed_steps for launch in times.launches) == redone
        assert times.furthest_step == furthest
        assert min(times.seconds.values()) >= 0
        step = max(0, step - lost)


def test_a_rewind_recomputes(tmp_path):
    time = Time()
    clock = PhaseClock(time)
    goodput = Goodput(tmp_path, clock, 0, [time.now], wall=time)
    for step in (1, 2, 3, 2, 3, 4):
        clock.enter(UPDATE)
        time.now += 10
        clock.enter(BETWEEN)
        goodput.step_done(step)
    goodput.close(0)
    times = read_times(tmp_path)
    assert times.seconds == dict.fromkeys(KINDS, 0.0) | {"productive": 40.0, "recomputed": 20.0}
    assert times.launches[0].recomputed_steps == 2
    assert share_of(times.seconds) == pytest.approx(2 / 3)
    assert times.words == "goodput of 0:01:00 in 1 launch: productive 66.7% | recomputed 33.3%"


def test_nobody_waited_for_a_run_that_was_finished(tmp_path):
    time = Time()
    for _ in range(2):
        goodput = Goodput(tmp_path, PhaseClock(time), 0, [time.now], wall=time)
        goodput.close(0)
        time.now += 1e6
    assert sum(read_times(tmp_path).seconds.values()) == 0


def test_an_agent_that_outlives_a_launch_does_not_begin_the_next(tmp_path):
    """As torchrun, which starts its ranks again: of its life counts what comes after the launch before."""
    time = Time()
    agent = time.now
    goodput = Goodput(tmp_path, PhaseClock(time), 0, [agent, agent], wall=time)
    time.now += 50
    goodput.close(1)
    time.now += 7
    second = Goodput(tmp_path, PhaseClock(time), 0, [agent, time.now], wall=time)
    assert second.times.launches[-1].seconds["restart"] == 7
    assert sum(second.times.seconds.values()) == 57


def test_nothing_is_written_into_another_folder(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    goodput = Goodput(run, PhaseClock(), 0, [0.0])
    run.rename(tmp_path / "moved")
    goodput.close(1)
    run.mkdir()
    goodput.close(1)
    assert not list(run.iterdir())
    assert read_times(tmp_path / "moved").launches[0].exit_code is None


@pytest.mark.parametrize("content", [b"", b"{", b'{"launches": 3}', b'{"unknown": 1}'])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / GOODPUT_FILE).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{GOODPUT_FILE} cannot be read: remove it"):
        read_times(tmp_path)


def test_the_file_costs_a_thousandth_of_the_time(tmp_path, monkeypatch):
    time, written = Time(), []

    def write(path, data: bytes) -> None:
        time.now += 0.01
        written.append(json.loads(data))

    monkeypatch.setattr("training.goodput.write_atomically", write)
    clock = PhaseClock(time)
    goodput = Goodput(tmp_path, clock, 0, [time.now], wall=time)
    for step in range(1, 1001):
        time.now += 0.1
        goodput.step_done(step)
        goodput.keep()
    assert len(written) == pytest.approx(100 / 10, abs=2)
