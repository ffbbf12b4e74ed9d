"""What ends a run before its last step."""

from engine.engine import Engine
from engine.run.outputs import Outputs
from launch.signals import REASONS, StopSignal
from training.state import TrainState


def agree_to_stop(engine: Engine, stop: StopSignal, out_of_time: bool, outputs: Outputs) -> bool:
    """Whether any rank was asked to stop or is out of time; then all have the same reason, and so the same exit code.

    By the way the ranks hear how long each has worked.
    """
    own = stop.name or ("time limit" if out_of_time else None)
    counts = engine.sum_over_ranks([float(own == reason) for reason in REASONS] + outputs.pace.of_ranks())
    outputs.hear_of(counts[len(REASONS) :])
    agreed = [reason for reason, count in zip(REASONS, counts, strict=False) if count]
    stop.name = agreed[0] if agreed else stop.name
    return bool(agreed)


def give_up_after_skips(state: TrainState, most: int) -> None:
    if state.consecutive_skipped_steps >= most:
        raise ValueError(
            f"{most} steps in a row had a loss or gradient that is not finite, or a spike (the last is step {state.step}); the "
            "weights are those of before: lower optimizer.lr, lengthen the warmup, or look at the samples of these steps"
        )
