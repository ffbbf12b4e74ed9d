"""What counts as a spike, and what is kept of decisions."""

import math
import statistics
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.decisions import Decision, SampleLeftOut, read_decisions, write_decisions
from training.spikes import DocumentLoss, SpikesConfig, spike, suspects
from training.state import TrainState

CONFIG = SpikesConfig(policy="skip", window_steps=16, threshold=6.0)
LEFT_OUT = SampleLeftOut(sample=7, source="s", row=3, epoch=0, documents=[5])
ONE = Decision(step=9, action="leave_out", reason="loss", checkpoint=8, samples=[LEFT_OUT])
TWO = Decision(step=20, action="reorder", reason="loss", checkpoint=16, stretch=(128, 160))


@given(st.lists(st.floats(1.0, 3.0), min_size=8, max_size=16), st.floats(0.0, 20.0))
def test_against_the_formula(losses, value):
    middle = statistics.median(losses)
    deviation = max(1.4826 * statistics.median(abs(each - middle) for each in losses), 0.01 * middle)
    found = spike(CONFIG, [(loss, 1.0) for loss in losses], value, 1.0)
    assert (found is not None) == (value > middle + 6.0 * deviation)


@pytest.mark.parametrize("figures", [(math.nan, 1.0), (2.0, math.inf)])
def test_what_is_not_finite_is_a_spike_from_the_first_step_on(figures):
    assert "not finite" in spike(CONFIG, [], *figures)


def test_nothing_else_is_before_half_a_window():
    assert spike(CONFIG, [(2.0, 1.0)] * 7, 100.0, 100.0) is None
    assert spike(CONFIG, [(2.0, 1.0)] * 8, 100.0, 1.0).startswith("loss 100")
    assert spike(CONFIG, [(2.0, 1.0)] * 8, 2.0, 100.0).startswith("gradient norm 100")


def test_a_few_outliers_do_not_hide_the_next():
    """With mean and standard deviation, as in OLMo-core, three of them do."""
    window = [(2.0 + 0.01 * (i % 3), 1.0) for i in range(13)] + [(40.0, 1.0)] * 3
    mean, deviation = statistics.mean(loss for loss, _ in window), statistics.stdev(loss for loss, _ in window)
    assert mean + 6 * deviation > 40.0
    assert spike(CONFIG, window, 40.0, 1.0)


def test_the_window_is_part_of_a_state_and_of_a_stage():
    state = TrainState(data_fingerprint="f", seed=0, wandb_id="w")
    for number in range(20):
        state.remember(float(number), 0.5, 16)
    again = TrainState.model_validate_json(state.model_dump_json())
    assert again.window == [(float(number), 0.5) for number in range(4, 20)]
    again.enter(1, "g")
    assert again.window == []


def test_the_worst_document_is_named_first():
    fine = [DocumentLoss(k, 0, 2.0 * 50 + k, 50) for k in range(20)]
    short = DocumentLoss(30, 0, 90.0, 3)
    bad, broken = DocumentLoss(31, 2, 9.0 * 40, 40), DocumentLoss(32, 0, math.nan, 40)
    assert suspects(CONFIG, [*fine, short, bad]) == [bad]
    assert suspects(CONFIG, [*fine, bad, broken]) == [broken, bad]
    assert suspects(CONFIG, fine) == suspects(CONFIG, []) == []


def test_decisions_are_kept_and_restored(tmp_path: Path):
    assert read_decisions(tmp_path) == []
    write_decisions(tmp_path, [ONE, TWO])
    assert read_decisions(tmp_path, [ONE]) == [ONE, TWO]
    (tmp_path / "decisions.jsonl").unlink()
    assert read_decisions(tmp_path, [ONE]) == [ONE]


def test_other_decisions_than_the_checkpoints_are_refused(tmp_path: Path):
    write_decisions(tmp_path, [TWO])
    with pytest.raises(ValueError, match=r"decisions.jsonl is not what the run's checkpoint was trained with"):
        read_decisions(tmp_path, [ONE])
    (tmp_path / "decisions.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"decisions.jsonl: a line is not a decision"):
        read_decisions(tmp_path)
