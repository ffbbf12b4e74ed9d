"""Learning-rate schedules as pure functions of the optimizer step.

A schedule is three landmarks on the axis of optimizer steps: the end of warmup, the start of decay, the end of the run.
Lengths given in tokens are divided by the tokens of one step, without rounding, so both units describe one curve.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

WSD_DEFAULT_DECAY_SHARE = 0.1

# x in [0, 1] is how much of the decay has passed; every shape falls from 1 to 0.
SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}


class ScheduleConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True, allow_inf_nan=False)

    schedule: Literal["cosine", "wsd", "linear", "constant"] = "cosine"
    """What follows warmup: `cosine` or `linear` decay to the end of the run, `wsd` (constant, then a final decay), or
    `constant`."""

    warmup_steps: NonNegativeInt | None = None
    """Optimizer steps over which the learning rate grows linearly to its peak; 0 or unset: none."""

    warmup_tokens: NonNegativeInt | None = None
    """The same length in tokens; give one of the two."""

    decay_steps: PositiveInt | None = None
    """`wsd` only: optimizer steps of the final decay; unset: a tenth of the run."""

    decay_tokens: PositiveInt | None = None
    """The same length in tokens; give one of the two."""

    decay_shape: Literal["linear", "sqrt", "cosine"] = "sqrt"
    """`wsd` only: the final decay falls as 1 - x, as 1 - sqrt(x) (Hägele et al. 2024), or as half a cosine."""

    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """The learning rate at the end of the run, as a share of its peak."""

    @model_validator(mode="after")
    def _one_unit_each(self) -> Self:
        for length in ("warmup", "decay"):
            if getattr(self, f"{length}_steps") is not None and getattr(self, f"{length}_tokens") is not None:
                raise ValueError(f"{length}_steps and {length}_tokens say the same thing twice: remove one of them")
        return self

    def without_effect(self) -> list[str]:
        """Names of the fields that were set but that this schedule does not use, for a warning."""
        unused = set() if self.schedule == "wsd" else {"decay_steps", "decay_tokens", "decay_shape"}
        if self.schedule == "constant":
            unused.add("min_lr_ratio")
        return sorted(name for name in unused & self.model_fields_set if getattr(self, name) is not None)


class Landmarks(NamedTuple):
    """Positions in optimizer steps, fractions allowed; `decay_start` is infinite where nothing decays."""

    warmup_end: float
    decay_start: float
    decay_end: float


def landmarks(config: ScheduleConfig, total_steps: int, step_tokens: int) -> Landmarks:
    """Where warmup ends and decay begins and ends.

    Args:
        total_steps: optimizer steps of the whole run.
        step_tokens: tokens of one optimizer step over all ranks, padding included.

    Raises:
        ValueError: warmup and decay do not fit into the run.
    """
    warmup = _length(config.warmup_steps, config.warmup_tokens, step_tokens) or 0.0
    if config.schedule == "constant":
        return Landmarks(warmup, math.inf, math.inf)
    if config.schedule == "wsd":
        decay = _length(config.decay_steps, config.decay_tokens, step_tokens) or total_steps * WSD_DEFAULT_DECAY_SHARE
        if warmup + decay > total_steps:
            both = f"warmup ({warmup:g} steps) and decay ({decay:g} steps)"
            raise ValueError(f"schedule: {both} do not fit into {total_steps} steps: shorten them or lengthen the run")
        return Landmarks(warmup, total_steps - decay, float(total_steps))
    if warmup >= total_steps:
        raise ValueError(
            f"schedule: warmup ({warmup:g} steps) leaves nothing of {total_steps} steps for the decay: shorten it,"
            " lengthen the run, or use schedule: constant"
        )
    return Landmarks(warmup, warmup, float(total_steps))


def lr_factor(config: ScheduleConfig, step: int, total_steps: int, step_tokens: int = 1) -> float:
    """The learning rate of optimizer step `step` (the first is 1) as a share of its peak.

    Warmup is step / warmup: the first step already learns, the last step of warmup runs at the peak. The last step of
    the run has `min_lr_ratio`, and so have any steps after it. Arguments and errors as for `landmarks`.
    """
    assert step >= 1, "steps are counted from 1"
    warmup_end, decay_start, decay_end = landmarks(config, total_steps, step_tokens)
    if step < warmup_end:
        return step / warmup_end
    if step <= decay_start:
        return 1.0
    if step >= decay_end:
        return config.min_lr_ratio
    shape = SHAPES[config.decay_shape if config.schedule == "wsd" else config.schedule]
    remaining = shape((step - decay_start) / (decay_end - decay_start))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * remaining


def _length(steps: int | None, tokens: int | None, step_tokens: int) -> float | None:
    if tokens is not None:
        return tokens / step_tokens
    return None if steps is None else float(steps)
