"""Where a run's figures, events and checkpoints go."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Self

import torch

from engine.checkpoint.manifest import folder_name
from engine.checkpoint.retention import Retention
from engine.checkpoint.saving import Saves
from engine.engine import Engine
from engine.layer_statistics import Figures
from engine.run.folder import check_claim
from engine.run.pace import Pace
from engine.run.plan import RunPlan
from engine.run.planned import PlanCheck
from engine.run.stages import Stage
from engine.run.validation import validate_all
from engine.run.watchdog import Watchdog
from engine.step import StepResult
from launch.beginning import begins_of_launch
from launch.rank import PRESENT
from launch.signals import StopSignal
from launch.told import StepFile, taken_restart
from launch.topology import wandb_mode
from training.decisions import Decision
from training.environment import peak_memory_bytes
from training.goodput import DATA, GOODPUT_FILE, SAVE, UPDATE, VALIDATION, Goodput, PhaseClock, read_times
from training.metrics import MetricsLogger
from training.state import TrainState
from training.throughput import StepClock, peak_rate

MEND = "make room or mend the file system and run the same command again"


class Outputs:
    """The logger (silent on all ranks but the first), the clock that knows the hardware's peak rate, and the run's folder.

    `lock`: what `claim_run` gave to the first rank. Collective over all ranks to make.
    """

    def __init__(
        self, engine: Engine, plan: RunPlan, state: TrainState, facts: dict[str, Any], run: Path, lock: IO | None
    ) -> None:
        self.plan, self.facts, self.run, self.lock = plan, facts, run, lock
        self._phases = PhaseClock()
        self._goodput: Goodput | None = None
        """On the first rank."""
        self._exit_code: int | None = None
        peak = peak_rate(engine.device, torch.bfloat16 if plan.half_precision else torch.float32)
        self.clock = StepClock(engine.sum_over_ranks([peak.flops_per_second])[0])
        self.logger = MetricsLogger(
            run,
            plan.recipe.logging,
            is_first_rank=plan.mesh.rank == 0,
            total_steps=plan.total_steps,
            resumed_step=state.step,
            run_id=state.wandb_id,
            facts=facts,
            peak_label=peak.label,
            wandb_mode=wandb_mode(),
        )
        self._step_file = StepFile(run) if lock else None
        roll_call = PRESENT[0] if PRESENT else None
        self.watchdog = Watchdog(run, plan.recipe.training.hang_seconds, roll_call, self._phases)
        self.pace = Pace(engine)
        self._plan_check = PlanCheck(plan, engine.device)
        self._step = state.step
        self._device = engine.device
        self._collapsed = False
        self._background = plan.recipe.checkpoint.background
        self._saves = Saves(run, facts, self._background, Retention(run, plan.recipe.checkpoint).retire)

    def __enter__(self) -> Self:
        self.logger.__enter__()
        self.watchdog.__enter__()
        if self.lock:
            restart = taken_restart(self.run)
            self._goodput = self._open_goodput(restart.get("reason", ""))
            if restart:
                self.logger.log_event(self._step, "restart", **restart)
        return self

    def _open_goodput(self, reason: str) -> Goodput:
        try:
            read_times(self.run)
        except ValueError as error:
            (self.run / GOODPUT_FILE).unlink()
            self.logger.log_event(self._step, "notice", text=f"{error}, from here on: it was removed")
        return Goodput(self.run, self._phases, self._step, begins_of_launch(), reason)

    def __exit__(self, *exception: Any) -> None:
        self.watchdog.close(failed=exception[0] is not None)
        if self._step_file:
            self._step_file.close()
        self._saves.leave()
        self.logger.__exit__(*exception)
        if self._goodput:
            self._goodput.close(self._exit_code)

    def announce(self, stage: Stage, step: int) -> None:
        """What is trained on from here, and what a token of it costs."""
        recipe = self.plan.recipe
        self.watchdog.forget_usual()
        self.clock.flops_per_token = recipe.model.flops_per_token(stage.mean_document_tokens, recipe.objective.copies)
        if recipe.stages:
            self.logger.log_event(step, "stage", name=stage.name, seq_length=stage.seq_length, data=stage.data)

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """The samples of a step are awaited in here; afterwards it is computed."""
        self._phases.enter(DATA)
        with self.clock.waiting_for_data(), self.pace.waiting_for_data():
            yield
        self._phases.enter(UPDATE)

    def report(
        self, result: StepResult, learning_rate: float, state: TrainState, layers: Figures | None = None
    ) -> None:
        """`state`: after the step."""
        self._step = state.step
        self.clock.step_done(self.plan.step_tokens)
        self.watchdog.step_done(state.step)
        self._tell_of_saves()
        if self._goodput:
            self._goodput.step_done(state.step)
            self._goodput.keep()
        if self._step_file:
            self._step_file.mark(state.step)
        if not result.applied:
            self.logger.log_event(state.step, "skip", loss=result.loss, grad_norm=result.grad_norm)
        members, effective = self.plan.recipe.adapters.members, result.adapters.get("effective_adapters")
        if effective is not None and (collapsed := 2 * effective < members) != self._collapsed:
            self._collapsed = collapsed
            text = f"{effective:.2f} of {members} adapters are in use: " + (
                "the others learn next to nothing; begin with other seeds, or route rows"
                if collapsed
                else "again enough"
            )
            self.logger.log_event(state.step, "notice", text=text)
        if self.logger.due(state.step):
            self.logger.log_step(
                state.step,
                samples=state.consumed_samples,
                tokens=state.consumed_tokens,
                loss=result.loss,
                objective=result.objective,
                learning_rate=learning_rate,
                grad_norm=result.grad_norm,
                skipped_steps=state.skipped_steps,
                rates=self.clock.read(),
                attention_imbalance=result.attention_imbalance,
                memory_bytes=peak_memory_bytes(self._device),
                wire_bytes=result.wire_bytes,
                adapters=result.adapters,
                wall_seconds=self._goodput.times.seconds if self._goodput else None,
            )
        if layers is not None:
            self.logger.log_layers(state.step, layers.layers, layers.groups)
        if compared := self._plan_check.step_done():
            self.logger.log_event(state.step, "plan", **compared)

    def decided(self, decision: Decision, step: int) -> None:
        """About a spike; `step`: the last that is still done. Records of those that will be done again are taken back."""
        self.logger.go_back(step)
        named = [f"{each.document} of {each.source}" for each in decision.suspects[:4]]
        told = {"spike_step": decision.step, "action": decision.action, "reason": decision.reason, "documents": named}
        self.logger.log_event(step, "spike", **told, left_out=len(decision.samples))

    def hear_of(self, seconds: list[float]) -> None:
        """What each rank has worked for the step just done; zeros where that was said before."""
        for sentence in self.pace.slow(seconds):
            self.logger.log_event(self._step, "notice", text=sentence)

    def validate(self, engine: Engine, stopping: Callable[[], bool], step: int) -> None:
        """The scores of all sets. Collective over all ranks, as is `stopping`."""
        with self.watchdog.aside(VALIDATION):
            scores = validate_all(engine, self.plan, stopping)
        if scores:
            self.logger.log_validation(step, scores)
        else:
            self.logger.log_event(step, "notice", text="validation was left out: asked to stop")

    def save(self, engine: Engine, state: TrainState) -> None:
        """Begin a checkpoint, when the one before is complete. Collective over all ranks.

        Where there was only no room for the one before, or for this one, training goes on.
        """
        self.complete(engine)
        if self.lock:
            check_claim(self.run, self.lock)
        with self.watchdog.aside(SAVE):
            self._saves.begin(engine, state)
        if not self._background:
            self.complete(engine)

    def close(self, exit_code: int) -> None:
        """After the last step of this launch."""
        self.watchdog.close()
        self._exit_code = exit_code
        if self._goodput:
            self.logger.say(self._step, self._goodput.times.words)
        self.logger.close(exit_code)

    def ended(self, engine: Engine, state: TrainState, stop: StopSignal) -> int:
        """What was saved last is complete when this returns the exit code. Collective over all ranks."""
        self.complete(engine, last=True)
        if state.step == self.plan.total_steps:
            return 0
        self.logger.log_event(state.step, "stop", reason=stop.name, next="run the same command to continue")
        return stop.exit_code

    def complete(self, engine: Engine, last: bool = False) -> None:
        """Wait for the save in flight. Collective over all ranks.

        Raises ValueError where it failed and none that follows can make up for it.
        """
        with self.watchdog.aside(SAVE):
            outcome = self._saves.wait(engine)
        self._tell_of_saves()
        if outcome and outcome.problem and (last or not outcome.may_pass):
            raise ValueError(f"{outcome.problem}: {MEND}")

    def _tell_of_saves(self) -> None:
        """On the first rank; raises as `complete`, at once."""
        if (outcome := self._saves.news()) is None:
            return
        if outcome.problem:
            if self.lock:
                check_claim(self.run, self.lock)
            if not outcome.may_pass:
                raise ValueError(f"{outcome.problem}: {MEND}")
            text = f"{outcome.problem}: training goes on to the next save"
            self.logger.log_event(outcome.step, "checkpoint_failed", text=text)
            return
        times = {name: round(getattr(outcome, name), 3) for name in ("stall_seconds", "seconds")}
        self.logger.log_event(outcome.step, "checkpoint", name=folder_name(outcome.step), **times)
        for sentence in outcome.notices:
            self.logger.log_event(outcome.step, "notice", text=sentence)
