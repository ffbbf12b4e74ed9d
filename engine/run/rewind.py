"""What is done about a spike: a decision, written down, and the state that it leads to.

The step was refused before it changed anything, so the weights are still those that made the spike, and name its documents.
"""

import math
from pathlib import Path

from engine.checkpoint.folder import agree_on_checkpoint
from engine.checkpoint.verification import on_first_rank
from engine.document_losses import document_losses
from engine.engine import Engine
from engine.run.plan import RunPlan
from engine.run.resume import restore
from engine.run.samples import order_of
from training.batch import Batch
from training.decisions import Decision, SampleLeftOut, Suspect, read_decisions, write_decisions
from training.spikes import SpikesConfig, suspects
from training.state import TrainState

MOST_NAMED = 20


def recall_decisions(plan: RunPlan, state: TrainState, run: Path) -> list[Decision]:
    """What the run's folder, or else its checkpoint, says was decided. Collective over all ranks.

    Raises ValueError where the two differ, or a decision is not about the recipe's stages.
    """

    def recall(_: object) -> list[Decision]:
        found = read_decisions(run, state.decisions)
        for decision in found:
            stage = plan.stages[decision.stage] if decision.stage < len(plan.stages) else None
            if stage is None or not stage.begin < decision.step <= stage.end:
                raise ValueError(
                    f"{run}: at step {decision.step} something was decided about stage {decision.stage + 1}, which the "
                    "recipe does not have there: restore its stages, or choose another --output"
                )
        write_decisions(run, found)
        return found

    return on_first_rank(recall)


def settle(
    engine: Engine, plan: RunPlan, state: TrainState, batches: list[Batch], reason: str, run: Path
) -> tuple[Decision, TrainState]:
    """Decide about the refused step that `state` comes after, write it down, and return where the run goes on.

    `batches`: this rank's of the step. Collective over all ranks. Raises ValueError where spikes come too often.
    """
    config = plan.recipe.training.spikes
    assert config is not None
    found = None if config.policy == "skip" else agree_on_checkpoint(run)[0]
    decision = _decide(engine, plan, state, batches, reason, found[1].state if found else None)
    decisions = [*state.decisions, decision]
    _check_bound(config, decisions)
    on_first_rank(lambda _: write_decisions(run, decisions))
    if found is not None:
        state = restore(engine, *found)
    state.decisions = decisions
    return decision, state


def _decide(
    engine: Engine, plan: RunPlan, state: TrainState, batches: list[Batch], reason: str, saved: TrainState | None
) -> Decision:
    """`saved`: the state that the run can go back to, if there is one."""
    config, number = plan.recipe.training.spikes, len(state.stage_samples)
    assert config is not None
    dataset, used = plan.stages[number].dataset, plan.stages[number].batch.samples
    first, order = state.consumed_in_stage - used, order_of(plan, state)

    def describe(sample: int) -> SampleLeftOut:
        source, row, epoch = order.locate(sample)
        documents = dataset.row(source, row).seg_doc.tolist()
        return SampleLeftOut(sample=sample, source=source, row=row, epoch=epoch, documents=documents)

    worst, named = suspects(config, document_losses(engine, batches)), []
    for each in worst[:MOST_NAMED]:
        sample, loss = describe(each.sample), each.mean if math.isfinite(each.total) else None
        document, source = sample.documents[each.place], sample.source
        named.append(Suspect(document=document, source=source, sample=each.sample, loss=loss, targets=each.targets))
    decision = Decision(step=state.step, action="skip", reason=reason, stage=number, suspects=named)
    if saved is None:
        return decision
    if config.policy == "reorder":
        begin = saved.consumed_in_stage if len(saved.stage_samples) == number else 0
        changes = {"action": "reorder", "stretch": (begin, first + used)}
    else:
        left_out = sorted({each.sample for each in worst}) or range(first, first + used)
        changes = {"action": "leave_out", "samples": [describe(sample) for sample in left_out]}
    return decision.model_copy(update=changes | {"checkpoint": saved.step})


def _check_bound(config: SpikesConfig, decisions: list[Decision]) -> None:
    last = decisions[-1]
    near = [each for each in decisions if each.step > last.step - config.window_steps]
    if len(near) > config.max_decisions:
        documents = ", ".join(f"{each.document} of {each.source}" for each in last.suspects[:4])
        raise ValueError(
            f"{len(near)} spikes within {config.window_steps} steps, the last at step {last.step} ({last.reason}"
            + (f"; documents {documents}" if documents else "")
            + "): lower optimizer.lr, look at these documents, or raise training.spikes.max_decisions"
        )
