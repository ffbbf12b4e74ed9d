"""Judges one step: as the run's decisions say, or, beyond the last of them, by the recipe's detector."""

import math

from engine.gate import Judge
from engine.run.plan import RunPlan
from engine.step import StepResult
from training.decisions import decided_until, skipped
from training.spikes import spike
from training.state import TrainState


class SpikeWatch:
    """Of the step that comes after `state`, whose samples have been read."""

    def __init__(self, plan: RunPlan, state: TrainState) -> None:
        self._config, self._state = plan.recipe.training.spikes, state
        self._scales_loss = plan.ds_config.get("fp16", {}).get("enabled", False)
        self._known = skipped(state.decisions, state.step + 1)
        self._decides = not self._known and state.step + 1 >= decided_until(state.decisions)
        self._reason: str | None = None

    @property
    def judge(self) -> Judge | None:
        """Of the update; None where none is called for."""
        return self._refuses if self._known or (self._decides and self._config) else None

    def _refuses(self, loss: float, grad_norm: float) -> bool:
        if self._decides and self._config:
            self._reason = spike(self._config, self._state.window, loss, grad_norm)
        return self._known or self._reason is not None

    def after(self, result: StepResult) -> str | None:
        """Why the step was refused, if it is still to be decided what to do about it; an applied one is remembered."""
        overflow = self._scales_loss and math.isfinite(result.loss)  # of a gradient whose scale is being found
        if not result.applied and self._reason is None and not overflow:
            self._refuses(result.loss, result.grad_norm)
        if result.applied and self._config:
            self._state.remember(result.loss, result.grad_norm, self._config.window_steps)
        return self._reason
