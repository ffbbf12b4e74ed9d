"""How much attention the first steps of a stage cost: counted from the documents in the rows that they will read."""

from typing import NamedTuple

import numpy as np

from engine.run.plan import RunPlan
from engine.run.stages import Stage
from training.balance import deal, lengths_of_row
from training.data import training_order

MOST_ROWS = 4096
"""To be looked at: a second or two, whatever the size of the data set or of a step."""
MOST_STEPS = 20


class StepRows(NamedTuple):
    """What the micro-batches of some steps hold, by step, data-parallel rank and micro-batch."""

    pairs: np.ndarray
    """float64 [steps, ranks, accumulation]: (query, key) pairs that are visible, padding included."""
    documents: np.ndarray
    """The same of documents, of which padding is one."""

    @property
    def mean_pairs(self) -> float:
        return float(self.pairs.mean())


def rows_of_steps(plan: RunPlan, stage: Stage) -> StepRows:
    """The first steps of a stage, as many as `MOST_ROWS` and `MOST_STEPS` allow.

    Of a step with more rows than that only the first ranks are looked at, one at least. What earlier stages have taken of the
    same data is not left out: that changes which rows are read, not what rows are like.
    """
    copies, visibility = plan.recipe.objective.copies, plan.recipe.model.visibility
    batch, ranks = stage.batch, plan.mesh.data
    of_rank = batch.micro_batch_samples * batch.accumulation
    looked_at = max(1, min(ranks, MOST_ROWS // of_rank))
    steps = max(1, min(MOST_STEPS, stage.end - stage.begin, MOST_ROWS // (of_rank * looked_at)))
    data = plan.training_data(stage, training_order(stage.dataset, stage.config, plan.recipe.training.seed))
    pairs, documents = [], []
    for step in range(steps):
        # a step's rows lie by micro-batch, then rank
        places = np.arange(batch.samples).reshape(batch.accumulation, ranks, -1)[:, :looked_at]
        numbers = step * batch.samples + places
        sources, rows = data.places(numbers.flatten())
        distinct, which = np.unique(np.stack([sources, rows]), axis=1, return_inverse=True)
        lengths = [lengths_of_row(stage.dataset, *place) for place in distinct.T.tolist()]
        cost = np.array([visibility.pairs(each).sum() for each in lengths])[which.ravel()]
        order = np.arange(len(cost)).reshape(places.shape)
        if data.visibility is not None and ranks > 1:
            order = deal(cost, batch.micro_batch_samples, looked_at)
        counts = np.array([len(each) for each in lengths])[which.ravel()]
        pairs.append(copies * cost[order].sum(-1).T)
        documents.append(copies * counts[order].sum(-1).T)
    return StepRows(np.array(pairs, float), np.array(documents, float))
