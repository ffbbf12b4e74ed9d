"""Stages: their lengths, and the epochs that stages over one data set share."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.shards import open_split
from tests.properties import examples
from tests.training.corpus import build
from training.data import training_order
from training.sampler import SampleOrder
from training.sections import DataConfig, StageConfig
from training.stages import stage_order
from training.state import TrainState

SEED = 5


class Rows:
    """Stands where a data set does for an order: the rows of each source and a fingerprint."""

    split = "train"

    def __init__(self, rows: dict[str, int], fingerprint: str = "f"):
        self.rows_per_source, self.manifest = rows, self
        self.fingerprint = fingerprint


@st.composite
def runs(draw) -> tuple[list[tuple[Rows, DataConfig]], list[int]]:
    """Two to four stages over the same rows (now and then over others), with the samples that each uses."""
    rows = draw(st.dictionaries(st.sampled_from("abc"), st.integers(1, 700), min_size=1))
    parts, used = [], []
    for number in range(draw(st.integers(2, 4))):
        weights = {name: draw(st.sampled_from([0.0, 0.01, 0.3, 1.0, 4.0])) for name in rows}
        weights = weights if any(weights.values()) else dict.fromkeys(rows, 1.0)
        elsewhere = number and draw(st.integers(0, 3)) == 0
        parts.append((Rows(rows, "other" if elsewhere else "f"), DataConfig(weights=weights)))
        used.append(draw(st.integers(0, 3000)))
    return parts, used


def draws(parts, used, stage: int) -> list[tuple[str, str, int, int]]:
    """(fingerprint, source, epoch, row) of the samples of a stage, in order."""
    order = stage_order(parts[: stage + 1], used[:stage], SEED)
    source, row, epoch = order.locate_many(np.arange(used[stage]))
    name = parts[stage][0].fingerprint
    return [
        (name, order.sources[s], e, r) for s, e, r in zip(source.tolist(), epoch.tolist(), row.tolist(), strict=True)
    ]


def block(parts) -> int:
    """Samples in the longest block of the mixtures."""
    return max(1 << training_order(*part, SEED)._block_bits for part in parts)


@given(runs())
@examples(150)
def test_over_all_stages_the_rows_of_a_source_come_in_whole_permutations(run):
    """No row twice in an epoch; an epoch that is behind by more than what unfinished blocks hold back lacks no row."""
    parts, used = run
    drawn = [draw for stage in range(len(used)) for draw in draws(parts, used, stage)]
    assert max(Counter(drawn).values(), default=1) == 1
    of_sources = {}
    for fingerprint, source, epoch, row in drawn:
        of_sources.setdefault((fingerprint, source), {}).setdefault(epoch, []).append(row)
    for (_, source), epochs in of_sources.items():
        size = parts[0][0].rows_per_source[source]
        taken = sum(map(len, epochs.values()))
        for epoch in range((taken - len(parts) * block(parts)) // size):
            assert sorted(epochs[epoch]) == list(range(size))
        assert max(epochs) * size < taken + len(parts) * block(parts)


@given(st.integers(1, 700), st.lists(st.integers(0, 2000), min_size=2, max_size=5))
def test_one_source_cut_into_stages_is_one_sequence(size, used):
    parts = [(Rows({"a": size}), DataConfig(weights={"a": 1.0}))] * len(used)
    whole = SampleOrder({"a": size}, {"a": 1.0}, "f", SEED).locate_many(np.arange(sum(used)))
    staged = [draw for stage in range(len(used)) for draw in draws(parts, used, stage)]
    assert [(e, r) for _, _, e, r in staged] == list(zip(whole[2].tolist(), whole[1].tolist(), strict=True))


@given(runs())
@examples(40)
def test_what_is_left_is_exactly_what_was_not_drawn(run):
    """Against a slow account of every draw: epochs times rows plus the place in the epoch's permutation."""
    parts, used = run
    parts = [(Rows(parts[0][0].rows_per_source), config) for _, config in parts]
    order, seen = None, {name: set() for name in parts[0][0].rows_per_source}
    for stage, samples in enumerate(used):
        order = stage_order(parts[: stage + 1], used[:stage], SEED)
        source, draw = order._draw(np.arange(samples))
        for s, name in enumerate(order.sources):
            seen[name] |= set(order._continued(s, draw[source == s]).tolist())
    for name, taken in order.drawn_after(used[-1]).items():
        assert set(taken.left.tolist()) == set(range(taken.end)) - seen[name]
        assert taken.left.tolist() == sorted(taken.left.tolist())
        assert max(seen[name], default=-1) < taken.end
        assert len(taken.left) < len(parts) * block(parts)


def test_a_source_that_one_stage_leaves_out_goes_on_in_the_next():
    rows = Rows({"a": 2000, "b": 2000})
    parts = [(rows, DataConfig(weights={"a": a, "b": b})) for a, b in ((1, 1), (1, 0), (0, 1))]
    used = [600, 400, 700]
    drawn = [draw for stage in range(3) for draw in draws(parts, used, stage)]
    assert len(set(drawn)) == 1700
    assert {source for _, source, *_ in draws(parts, used, 1)} == {"a"}
    assert {epoch for _, source, epoch, _ in drawn if source == "b"} == {0}


def test_other_data_begin_their_own_epochs():
    parts = [(Rows({"a": 9}, fingerprint), DataConfig(weights={"a": 1})) for fingerprint in "fgf"]
    alone = draws([parts[1]], [9], 0)
    assert draws(parts, [4, 9, 5], 1) == alone
    assert sorted(row for *_, row in draws(parts, [4, 9, 5], 0) + draws(parts, [4, 9, 5], 2)) == list(range(9))


def test_the_first_stage_is_the_run_without_stages(tmp_path):
    build(tmp_path, {"books": list(range(1, 90)), "web": [7] * 60}, 16, weights={"books": 3.0, "web": 1.0})
    dataset = open_split(tmp_path, "train")
    staged, plain = stage_order([(dataset, DataConfig())], [], SEED), training_order(dataset, DataConfig(), SEED)
    assert staged.digest == plain.digest
    later = stage_order([(dataset, DataConfig())] * 2, [100], SEED)
    assert len({staged.digest, later.digest, stage_order([(dataset, DataConfig())] * 2, [101], SEED).digest}) == 3


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=5))
def test_the_state_counts_each_stage_by_itself(stages):
    state = TrainState(data_fingerprint="", seed=0, wandb_id="w")
    for number, (steps, samples) in enumerate(stages):
        state.enter(number, f"f{number}")
        assert state.consumed_in_stage == 0
        for _ in range(steps):
            state.advance(samples, 8, applied=True)
            state.enter(number, f"f{number}")
        assert state.consumed_in_stage == steps * samples
        assert TrainState.model_validate_json(state.model_dump_json()) == state
    assert state.stage_samples == [steps * samples for steps, samples in stages[:-1]]
    assert state.consumed_samples == sum(steps * samples for steps, samples in stages)


def test_a_state_written_before_there_were_stages_is_in_the_first():
    old = {"version": 1, "data_fingerprint": "f", "seed": 0, "step": 3, "consumed_samples": 24, "consumed_tokens": 99}
    state = TrainState.model_validate(old | {"skipped_steps": 0, "consecutive_skipped_steps": 0, "wandb_id": "w"})
    assert (state.stage_samples, state.consumed_in_stage) == ([], 24)


def test_lengths_in_steps_and_tokens():
    assert StageConfig(max_steps=7).steps(512) == 7
    assert StageConfig(max_tokens=513).steps(512) == 2
    for wrong in ({}, {"max_steps": 1, "max_tokens": 1}):
        with pytest.raises(ValueError, match="give exactly one of max_steps and max_tokens"):
            StageConfig(**wrong)
