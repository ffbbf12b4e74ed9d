"""Steps that do not look like those before them, and the documents that make them so.

A value is a spike where it lies further above the median of the last steps than a number of their deviations. Deviations are
1.4826 times the median distance from the median, which is the standard deviation of normally distributed values and hardly moves
for a few outliers (Hampel 1974, "The influence curve and its role in robust estimation"). What is left out as a spike does not
enter the window, so that one does not hide the next.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

OF_NORMAL = 1.4826
LEAST_DEVIATION = {"loss": 0.01, "gradient norm": 0.05}
"""As shares of the median: less varies from step to step where training goes well, and is no reason for alarm."""
FEW_TARGETS = 8
"""The mean loss of a document with fewer says nothing."""


class SpikesConfig(BaseModel):
    """`training.spikes` of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    policy: Literal["skip", "rewind", "reorder"]
    """What follows a spike, whose step is never applied. skip: the next step. rewind: go back to the last checkpoint and leave
    out the samples with the suspicious documents, or all of the step where none stands out. reorder: go back to it and take the
    samples since then in another order (PaLM, section 5.1: the same batches do not spike from other weights). Before the
    first checkpoint every spike is skipped."""
    window_steps: int = Field(default=128, ge=4)
    """Applied steps that a loss and a gradient norm are compared with; half of them must have been seen."""
    threshold: PositiveFloat = 6.0
    """Deviations above the median from which on a value is a spike."""
    max_decisions: PositiveInt = 10
    """End the run when more than so many spikes came within `window_steps` steps."""


class DocumentLoss(NamedTuple):
    """Of the part of a document that lies in one sample."""

    sample: int
    place: int
    """Among the documents of the sample's row."""
    total: float
    """Cross-entropy in nats of all its targets."""
    targets: int

    @property
    def mean(self) -> float:
        return self.total / self.targets


def spike(config: SpikesConfig, window: Sequence[tuple[float, float]], loss: float, grad_norm: float) -> str | None:
    """What is wrong with a step, in words. `window`: losses and gradient norms of the steps before it."""
    for name, value, before in (
        ("loss", loss, [loss for loss, _ in window]),
        ("gradient norm", grad_norm, [norm for _, norm in window]),
    ):
        if not math.isfinite(value):
            return f"{name} not finite"
        if 2 * len(before) < config.window_steps:
            continue
        middle, deviation = spread(before, LEAST_DEVIATION[name])
        if value > middle + config.threshold * deviation:
            distance = (value - middle) / deviation
            return f"{name} {value:.4g}, {distance:.1f} deviations above the median {middle:.4g} of {len(before)} steps"
    return None


def spread(values: Sequence[float], least: float) -> tuple[float, float]:
    """Median, and deviation from it; of the latter not less than the share `least` of the median."""
    middle = statistics.median(values)
    deviation = OF_NORMAL * statistics.median(abs(value - middle) for value in values)
    return middle, max(deviation, least * abs(middle), 1e-30)


def suspects(config: SpikesConfig, losses: Sequence[DocumentLoss]) -> list[DocumentLoss]:
    """Those of a step's documents that stand out by their mean loss, the worst first."""
    judged = [each for each in losses if each.targets >= FEW_TARGETS]
    broken = [each for each in judged if not math.isfinite(each.total)]
    sound = [each for each in judged if math.isfinite(each.total)]
    worst = sorted(sound, key=lambda each: each.mean, reverse=True)
    if not sound:
        return broken
    middle, deviation = spread([each.mean for each in sound], LEAST_DEVIATION["loss"])
    return broken + [each for each in worst if each.mean > middle + config.threshold * deviation]
