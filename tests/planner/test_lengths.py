"""The attention that is counted before a run is that of the batches that the run gets."""

import numpy as np
import pytest
import torch

from engine.run.plan import make_plan
from launch.topology import Topology
from model.documents import Documents
from planner.lengths import rows_of_steps
from tests.engine.programs import prepare
from training.data import train_loader, training_order


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("changes", [{}, {"model.sliding_window": "9"}])
def test_pairs_are_those_of_the_mask_of_the_very_batches(tmp_path, changes, balanced):
    recipe, data = prepare(tmp_path)
    (tmp_path / "ds.json").write_text("{}")
    overrides = changes | {"data.balance_attention": str(balanced).lower(), "training.micro_batch_samples": "2"}
    topology = Topology(0, 0, 2, torch.device("cpu"), 2)
    plan = make_plan(recipe, overrides, str(tmp_path / "ds.json"), data, topology)
    stage = plan.stages[0]
    rows = rows_of_steps(plan, stage)
    assert rows.pairs.shape == (8, 2, stage.batch.accumulation)
    order = training_order(stage.dataset, stage.config, plan.recipe.training.seed)
    for rank in range(2):
        loader = train_loader(
            plan.training_data(stage, order),
            stage.config,
            consumed=0,
            micro_batch_samples=2,
            accumulation=stage.batch.accumulation,
            world_size=2,
            rank=rank,
        )
        for step in range(3):
            for micro, batch in enumerate(next(loader)):
                tokens = Documents.from_position_ids(batch["position_ids"]).tokens()
                mask = plan.recipe.model.visibility.sees(tokens.at((slice(None), None)), tokens.at((None, slice(None))))
                assert rows.pairs[step, rank, micro] == mask.sum()
                assert rows.documents[step, rank, micro] == (batch["position_ids"] == 0).sum()
    assert rows.mean_pairs == np.mean(rows.pairs)
