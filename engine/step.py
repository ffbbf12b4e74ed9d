"""One optimizer step on an engine of any layout.

The loss is a sum over valid targets divided by the number of targets of the whole step, counted over all ranks and
micro-batches before the first backward pass. So it depends neither on how a step is divided nor on where padding falls.
"""

from typing import Any, NamedTuple

from engine.engine import Engine
from engine.gate import Judge
from engine.optimizer import drop_sums
from engine.survey import figures, prepare
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
    """False when the loss or the gradient was not finite, or refused: the weights are untouched."""
    attention_imbalance: float
    """How many more (query, key) pairs the busiest rank attended over than the average one, as a share."""
    wire_bytes: int | None
    """What this rank handed to the calls of a compressed reduction; None where DeepSpeed reduces."""
    adapters: dict[str, Any]
    """See `engine.survey.figures`."""


def train_step(
    engine: Engine, micro_batches: list[Batch], learning_rate: float, z_loss_weight: float, judge: Judge | None = None
) -> StepResult:
    """Forward, backward and update over this rank's micro-batches of one optimizer step, equally many on every rank.

    `judge` may refuse the update.
    """
    engine.fit(micro_batches[0]["input_ids"].shape, len(micro_batches))
    found, micro_batches = prepare(engine, micro_batches)
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
        group["targets"] = found.of_adapters.get(group.get("adapter"), found.targets)
    engine.judge_by(judge, max(found.targets, 1))
    # DeepSpeed averages over the ranks that hold other tokens and divides by the accumulation steps; both are undone here.
    weight = engine.mesh.data * engine.mesh.sequence * len(micro_batches) / max(found.targets, 1)
    sums = engine.totals(engine.update(micro_batches, z_loss_weight, weight))
    objective, loss = (total / max(found.targets, 1) for total in sums[:2])
    norm = engine.deepspeed.get_global_grad_norm()
    applied = engine.deepspeed.was_step_applied() and not engine.gate.refused
    if not applied:
        drop_sums(engine.optimizer)
    if engine.prior and applied:
        engine.prior.step(sums[-engine.prior.size :], found.targets, learning_rate)
    adapters = figures(engine, found, sums[2:])
    return StepResult(
        loss, objective, found.targets, float(norm), applied, found.attention_imbalance, engine.wire_bytes, adapters
    )
