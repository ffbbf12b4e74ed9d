"""Which samples an optimizer step has, and this rank's micro-batches of them."""

from collections.abc import Iterator

from engine.run.plan import RunPlan
from engine.run.stages import Stage
from training.batch import Batch
from training.data import train_loader
from training.decisions import Decision
from training.sampler import SampleOrder
from training.stages import stage_order
from training.state import TrainState


def order_of(plan: RunPlan, state: TrainState) -> SampleOrder:
    """Of the stage that a state is in."""
    number = len(state.stage_samples)
    parts = [(part.dataset, part.config) for part in plan.stages[: number + 1]]
    return stage_order(parts, state.stage_samples, plan.recipe.training.seed, state.decisions)


class StepSamples:
    """This rank's micro-batches of any optimizer step, read ahead as long as the steps follow one another."""

    def __init__(self, plan: RunPlan, pin_memory: bool = False) -> None:
        self._plan, self._pin_memory = plan, pin_memory
        self._expected: tuple[int, int, list[Decision]] | None = None
        self._batches: Iterator[list[Batch]] = iter(())

    def after(self, state: TrainState) -> list[Batch]:
        """Those of the step that comes after `state`, which enters the stage of that step."""
        stage = self._plan.stage_of(state.step + 1)
        number = self._plan.stages.index(stage)
        state.enter(number, stage.dataset.manifest.fingerprint)
        if self._expected != (number, state.consumed_in_stage, state.decisions):
            self._batches = self._open(stage, state)
        self._expected = number, state.consumed_in_stage + stage.batch.samples, list(state.decisions)
        return next(self._batches)

    def _open(self, stage: Stage, state: TrainState) -> Iterator[list[Batch]]:
        plan = self._plan
        return train_loader(
            plan.training_data(stage, order_of(plan, state)),
            stage.config,
            consumed=state.consumed_in_stage,
            micro_batch_samples=stage.batch.micro_batch_samples,
            accumulation=stage.batch.accumulation,
            world_size=plan.mesh.data,
            rank=plan.mesh.data_rank,
            pin_memory=self._pin_memory,
        )
