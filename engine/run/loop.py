"""The training loop: optimizer steps with their batches, reports, validations and checkpoints, to the end or a stop."""

import secrets
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

from engine.checkpoint.folder import save
from engine.checkpoint.retention import Retention
from engine.run.folder import check_claim
from engine.run.plan import RunPlan
from engine.run.stages import Stage
from engine.step import StepResult, agree_to_stop, sum_over_ranks, train_step
from engine.validation import validate_all
from launch.topology import Topology, wandb_mode
from training.data import train_loader
from training.environment import peak_memory_bytes
from training.metrics import MetricsLogger
from training.stages import stage_order
from training.state import TrainState
from training.throughput import StepClock, peak_rate


def train(engine, plan: RunPlan, state: TrainState, logger, clock, stop, topology, run: Path, facts: dict, lock) -> int:
    """One optimizer step at a time until the recipe's last, a request to stop or the time limit.

    `lock`: what `claim_run` gave to the first rank.
    """
    recipe, began = plan.recipe, time.monotonic()
    stage, batches = None, optimizer_steps(plan, state, topology)
    retention = Retention(run, recipe.checkpoint)

    def stopping() -> bool:
        out_of_time = time.monotonic() - began > (recipe.training.max_hours or float("inf")) * 3600
        return agree_to_stop(engine, stop, out_of_time)

    stop.leave_to_the_loop()
    while state.step < plan.total_steps:
        if stage is not (stage := plan.stage_of(state.step + 1)):
            announce(stage, plan, state, logger, clock)
        with clock.waiting_for_data():
            micro_batches = next(batches)
        learning_rate = plan.learning_rate(state.step + 1)
        result = train_step(engine, micro_batches, learning_rate, recipe.training.z_loss_weight)
        state.advance(stage.batch.samples, plan.step_tokens, result.applied)
        clock.step_done(plan.step_tokens)
        report(logger, clock, state, result, learning_rate, topology)
        give_up_after_skips(state, recipe.training.max_consecutive_skipped_steps)

        last = state.step == plan.total_steps
        with clock.aside():
            if plan.validation_sets and (last or state.step % recipe.validation.every_steps == 0):
                if scores := validate_all(engine, plan, stopping):
                    logger.log_validation(state.step, scores)
                else:
                    logger.log_event(state.step, "notice", text="validation was left out: asked to stop")
            if last or stopping() or state.step % recipe.checkpoint.every_steps == 0:
                if lock:
                    check_claim(run, lock)
                folder = save(engine, run, state, facts)
                logger.log_event(state.step, "checkpoint", name=folder.name)
                for sentence in retention.retire(folder) if topology.is_first else ():
                    logger.log_event(state.step, "notice", text=sentence)
                if not last and stopping():  # asked while saving, perhaps: what is saved need not be saved again
                    logger.log_event(state.step, "stop", reason=stop.name, next="run the same command to continue")
                    return stop.exit_code
    return 0


def new_state(plan: RunPlan) -> TrainState:
    return TrainState(
        data_fingerprint=plan.dataset.manifest.fingerprint,
        seed=plan.recipe.training.seed,
        wandb_id=secrets.token_hex(4),
    )


def optimizer_steps(plan: RunPlan, state: TrainState, topology: Topology) -> Iterator[list[dict]]:
    """This rank's micro-batches, one list an optimizer step, from the first sample that was not yet consumed."""
    while state.step < plan.total_steps:
        stage = plan.stage_of(state.step + 1)
        number = plan.stages.index(stage)
        state.enter(number, stage.dataset.manifest.fingerprint)
        parts = [(part.dataset, part.config) for part in plan.stages[: number + 1]]
        order = stage_order(parts, state.stage_samples, plan.recipe.training.seed)
        loader = train_loader(
            plan.training_data(stage, order),
            stage.config,
            consumed=state.consumed_in_stage,
            micro_batch_samples=stage.batch.micro_batch_samples,
            accumulation=stage.batch.accumulation,
            world_size=plan.mesh.data,
            rank=plan.mesh.data_rank,
            pin_memory=topology.device.type == "cuda",
        )
        yield from islice(loader, stage.end - state.step)


def open_outputs(engine, plan: RunPlan, state: TrainState, facts: dict, run: Path, topology: Topology):
    """The logger (silent on all ranks but the first) and the clock that knows the hardware's peak rate."""
    peak = peak_rate(topology.device, torch.bfloat16 if plan.half_precision else torch.float32)
    logger = MetricsLogger(
        run,
        plan.recipe.logging,
        is_first_rank=topology.is_first,
        total_steps=plan.total_steps,
        resumed_step=state.step,
        run_id=state.wandb_id,
        facts=facts,
        peak_label=peak.label,
        wandb_mode=wandb_mode(),
    )
    return logger, StepClock(sum_over_ranks(engine, [peak.flops_per_second])[0])


def announce(stage: Stage, plan: RunPlan, state: TrainState, logger, clock) -> None:
    """What is trained on from here, and what a token of it costs."""
    clock.flops_per_token = plan.recipe.model.flops_per_token(stage.mean_document_tokens, plan.recipe.objective.copies)
    if plan.recipe.stages:
        logger.log_event(state.step, "stage", name=stage.name, seq_length=stage.seq_length, data=stage.data)


def report(logger, clock, state: TrainState, result: StepResult, learning_rate: float, topology: Topology) -> None:
    if not result.applied:
        logger.log_event(state.step, "skip", loss=result.loss, grad_norm=result.grad_norm)
    if logger.due(state.step):
        logger.log_step(
            state.step,
            samples=state.consumed_samples,
            tokens=state.consumed_tokens,
            loss=result.loss,
            objective=result.objective,
            learning_rate=learning_rate,
            grad_norm=result.grad_norm,
            skipped_steps=state.skipped_steps,
            rates=clock.read(),
            attention_imbalance=result.attention_imbalance,
            memory_bytes=peak_memory_bytes(topology.device),
            wire_bytes=result.wire_bytes,
        )


def give_up_after_skips(state: TrainState, most: int) -> None:
    if state.consecutive_skipped_steps >= most:
        raise ValueError(
            f"{most} steps in a row had a loss or gradient that is not finite (the last is step {state.step}); the weights "
            "are those of before: lower optimizer.lr, lengthen the warmup, or look at the samples of these steps"
        )
