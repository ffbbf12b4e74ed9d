"""One optimizer step on an engine of any layout.

The loss is a sum over valid targets divided by the number of targets of the whole step, counted over all ranks and
micro-batches before the first backward pass. So it depends neither on how a step is divided nor on where padding falls.
"""

from typing import NamedTuple

import numpy as np

from engine.engine import Engine, documents_of
from engine.layout.deal import pairs_here
from engine.optimizer import drop_sums
from training.balance import imbalance
from training.batch import Batch


class StepResult(NamedTuple):
    loss: float
    """Cross-entropy per target in nats, over all ranks."""
    objective: float
    """What was minimised: the loss plus the weighted z-loss."""
    targets: int
    grad_norm: float
    """Norm of the whole gradient before clipping; not finite when the step was skipped for it."""
    applied: bool
    """False when the loss or the gradient was not finite: the weights are untouched."""
    attention_imbalance: float
    """How many more (query, key) pairs the busiest rank attended over than the average one, as a share."""
    wire_bytes: int | None
    """What this rank handed to the calls of a compressed reduction; None where DeepSpeed reduces."""


def train_step(engine: Engine, micro_batches: list[Batch], learning_rate: float, z_loss_weight: float) -> StepResult:
    """Forward, backward and update over this rank's micro-batches of one optimizer step.

    `micro_batches`: as training.data makes them; the same number on every rank.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    rows, tokens = micro_batches[0]["input_ids"].shape
    engine.fit((rows, tokens), len(micro_batches))
    targets, attention_imbalance = survey(engine, micro_batches)
    # DeepSpeed averages over the ranks that hold other tokens and divides by the accumulation steps; both are undone here.
    weight = engine.mesh.data * engine.mesh.sequence * len(micro_batches) / max(targets, 1)
    sums = engine.update(micro_batches, z_loss_weight, weight)
    objective, loss = (total / max(targets, 1) for total in engine.sum_over_tokens(sums.tolist()))
    norm, applied = engine.deepspeed.get_global_grad_norm(), engine.deepspeed.was_step_applied()
    if not applied:
        drop_sums(engine.optimizer)
    wire_bytes = engine.reduction.wire_bytes if engine.reduction else None
    return StepResult(loss, objective, targets, float(norm), applied, attention_imbalance, wire_bytes)


def survey(engine: Engine, batches: list[Batch]) -> tuple[int, float]:
    """Valid targets of the batches over all ranks, those of a row once however many ranks work on it; and how unevenly
    their attention is spread over the ranks that have other tokens (see `training.balance.imbalance`)."""
    mesh = engine.mesh
    ours = [0.0] * (1 + mesh.data * mesh.sequence)
    ours[0] = sum(batch["num_targets"] for batch in batches) / mesh.sequence
    place = 1 + mesh.data_rank * mesh.sequence + mesh.sequence_rank
    for batch in batches:
        ours[place] += pairs_here(documents_of(batch), engine.visibility, mesh)
    targets, *pairs = engine.sum_over_tokens(ours)
    return round(targets), imbalance(np.array(pairs))
