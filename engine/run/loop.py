"""The training loop: from whatever step a state says is next, one optimizer step after the other, to the end or a stop."""

import secrets
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from engine.engine import Engine
from engine.layer_statistics import Figures, LayerStatistics
from engine.run.outputs import Outputs
from engine.run.plan import RunPlan
from engine.run.rewind import settle
from engine.run.samples import StepSamples
from engine.run.spike_watch import SpikeWatch
from engine.run.stages import Stage
from engine.run.stopping import agree_to_stop, give_up_after_skips
from engine.step import StepResult, train_step
from launch.signals import StopSignal
from training.batch import Batch
from training.goodput import REWIND
from training.state import TrainState


class Step(NamedTuple):
    """One that was done."""

    stage: Stage
    micro_batches: list[Batch]
    learning_rate: float
    result: StepResult
    spike: str | None
    """Why it was refused and is still to be decided about."""
    layers: Figures | None


class TrainingLoop:
    """Every run's loop. `state` may be replaced between steps, by an earlier one too: the next step follows it."""

    def __init__(self, engine: Engine, plan: RunPlan, state: TrainState) -> None:
        self.engine, self.plan, self.state = engine, plan, state
        self._samples = StepSamples(plan, pin_memory=engine.device.type == "cuda")
        self._layers = LayerStatistics(engine, plan.recipe)

    def step(self, waiting: Callable[[], AbstractContextManager] = nullcontext) -> Step:
        """The next optimizer step. Collective over all ranks. `waiting`: entered while the samples are awaited."""
        stage, learning_rate = self.plan.stage_of(self.state.step + 1), self.plan.learning_rate(self.state.step + 1)
        with waiting():
            micro_batches = self._samples.after(self.state)
        watch = SpikeWatch(self.plan, self.state)
        self._layers.expect(self.state, micro_batches)
        result = train_step(
            self.engine, micro_batches, learning_rate, self.plan.recipe.training.z_loss_weight, watch.judge
        )
        self.state.advance(stage.batch.samples, self.plan.step_tokens, result.applied)
        return Step(stage, micro_batches, learning_rate, result, watch.after(result), self._layers.read(result))


def new_state(plan: RunPlan) -> TrainState:
    return TrainState(
        data_fingerprint=plan.dataset.manifest.fingerprint,
        seed=plan.recipe.training.seed,
        wandb_id=secrets.token_hex(4),
    )


def train(loop: TrainingLoop, outputs: Outputs, stop: StopSignal) -> int:
    """Steps with their reports, validations and checkpoints until the recipe's last, a request to stop or the time limit.

    Returns the exit code.
    """
    engine, plan, recipe, stage, began = loop.engine, loop.plan, loop.plan.recipe, None, time.monotonic()

    def stopping() -> bool:
        out_of_time = time.monotonic() - began > (recipe.training.max_hours or float("inf")) * 3600
        return agree_to_stop(engine, stop, out_of_time, outputs)

    stop.leave_to_the_loop()
    while (state := loop.state).step < plan.total_steps:
        if plan.stage_of(state.step + 1) is not stage:
            stage = plan.stage_of(state.step + 1)
            outputs.announce(stage, state.step)
        done = loop.step(outputs.waiting_for_data)
        outputs.report(done.result, done.learning_rate, state, done.layers)
        if done.spike:
            outputs.complete(engine)
            with outputs.watchdog.aside(REWIND):
                decision, loop.state = settle(engine, plan, state, done.micro_batches, done.spike, outputs.run)
            outputs.decided(decision, loop.state.step)
            if decision.checkpoint is not None:
                continue
        give_up_after_skips(state, recipe.training.max_consecutive_skipped_steps)

        last = state.step == plan.total_steps
        with outputs.clock.aside():
            if plan.validates_after(state.step):
                outputs.validate(engine, stopping, state.step)
            if last or stopping() or state.step % recipe.checkpoint.every_steps == 0:
                outputs.save(engine, state)
                if last or stopping():  # asked while saving, perhaps: what is saved need not be saved again
                    return outputs.ended(engine, state, stop)
    return 0
