"""Which samples a step of a run had, and in which step a sample was or will be: computed, not recorded.

Both follow from the stages, the history of the batch, the sample order and the decisions, whatever launches, layouts and rewinds
there were in between.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from storage.shards import ShardedDataset
from training.decisions import Decision
from training.sampler import SampleOrder
from training.sections import DataConfig
from training.stages import stage_order
from training.state import TrainState


class StageSpan(NamedTuple):
    """A stage of a run: the steps begin + 1 .. end."""

    name: str
    dataset: ShardedDataset
    config: DataConfig
    begin: int
    end: int
    samples: int
    """Of a step, by today's recipe."""


class Use(NamedTuple):
    """One time that a row is trained on."""

    step: int
    stage: str
    sample: int
    source: str
    row: int
    epoch: int
    documents: tuple[int, ...]


class SampleLedger:
    """Of the run whose newest state is `state`; what is after it will be if nothing changes."""

    def __init__(self, stages: Sequence[StageSpan], state: TrainState, decisions: Sequence[Decision]) -> None:
        self.stages, self.state, self.decisions = stages, state, decisions

    @property
    def steps(self) -> int:
        return self.stages[-1].end

    def of_step(self, step: int) -> list[Use]:
        """Every row of the step with this number. Raises ValueError where the run has no such step."""
        if not 1 <= step <= self.steps:
            raise ValueError(f"the run has the steps 1 to {self.steps}, not {step}")
        number = next(i for i, stage in enumerate(self.stages) if step <= stage.end)
        stage, order = self.stages[number], self._order(number)
        begin = self._consumed(stage.begin)
        numbers = np.arange(self._consumed(step - 1) - begin, self._consumed(step) - begin)
        sources, rows, epochs = (column.tolist() for column in order.locate_many(numbers))
        places = zip(numbers.tolist(), sources, rows, epochs, strict=True)
        return [self._use(step, stage, k, order.sources[source], row, epoch) for k, source, row, epoch in places]

    def of_row(self, dataset: ShardedDataset, source: str, row: int) -> Iterator[Use]:
        """Every time that this row is trained on, in the order of the steps."""
        for number, stage in enumerate(self.stages):
            if stage.dataset.manifest.fingerprint != dataset.manifest.fingerprint:
                continue
            order, begin = self._order(number), self._consumed(stage.begin)
            if source not in order.sources:
                continue
            total = self._consumed(stage.end) - begin
            last = order.last_epochs(total)[source]
            found = ((order.find(source, row, epoch), epoch) for epoch in range(last + 1))
            for sample, epoch in sorted((k, epoch) for k, epoch in found if k is not None and k < total):
                yield self._use(self._step_of(begin + sample), stage, sample, source, row, epoch)

    def _use(self, step: int, stage: StageSpan, sample: int, source: str, row: int, epoch: int) -> Use:
        documents = tuple(stage.dataset.pieces(stage.dataset.sources.index(source), row).seg_doc.tolist())
        return Use(step, stage.name, sample, source, row, epoch, documents)

    def _order(self, number: int) -> SampleOrder:
        bounds = [self._consumed(stage.begin) for stage in self.stages[: number + 1]]
        parts = [(stage.dataset, stage.config) for stage in self.stages[: number + 1]]
        return stage_order(parts, np.diff(bounds).tolist(), self.state.seed, self.decisions)

    def _history(self) -> list[tuple[int, int]]:
        """Steps in a row and the samples of each, from the first to the last."""
        done = [(steps, samples) for steps, samples, _ in self.state.batches]
        begun = sum(steps for steps, _ in done)
        coming = [(min(stage.end - stage.begin, stage.end - begun), stage.samples) for stage in self.stages]
        return done + [(steps, samples) for steps, samples in coming if steps > 0]

    def _consumed(self, step: int) -> int:
        """Samples used by all steps up to this one."""
        total = 0
        for steps, samples in self._history():
            total += min(steps, step) * samples
            step -= min(steps, step)
        return total

    def _step_of(self, position: int) -> int:
        """Of the sample that comes after so many others in the run."""
        step = 0
        for steps, samples in self._history():
            if position < steps * samples:
                return step + position // samples + 1
            position -= steps * samples
            step += steps
        raise AssertionError("beyond the last step")
