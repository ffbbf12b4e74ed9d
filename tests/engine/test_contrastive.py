"""The contrastive objective: pairs of all ranks meet, so a step is that of one process over the whole batch."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.document_losses import document_losses
from engine.run.loop import new_state
from engine.run.plan import make_plan
from engine.run.samples import StepSamples, order_of
from launch.topology import Topology
from model.documents import Documents
from model.hf.weights import load_hf, save_hf
from model.llama import Llama
from tests.engine.kept import kept
from tests.engine.programs import Run, interrupted, prepare, zero
from tests.engine.test_layouts import RECOMPUTE, SEQUENCE, SPLIT, TENSOR, pipeline
from tests.training.corpus import build
from training.config import load_recipe
from training.optimizer import parameter_groups
from training.schedule import lr_factor

STEPS = 8
CONTRASTIVE = {
    "objective.name": "contrastive",
    "objective.temperature": "0.1",
    "adapters.names": "[finder]",
    "adapters.mode": "single",
    "adapters.r": "4",
    "adapters.lora_dropout": "0.1",
    "training.z_loss_weight": "0",
    "validation.every_steps": "null",
    "optimizer.lr": "1e-3",
    "optimizer.eps": "1e-5",  # of vectors of length 1 over 0.1: rounding is larger than of a loss of tokens
}
WHOLE = {"training.micro_batch_samples": "8"}
ON = {
    1: {"zero0": (zero(0), WHOLE)},
    2: {"zero2-recompute": (zero(2), RECOMPUTE), "zero3": (zero(3), {})},
    4: {"zero1": (zero(1), {"training.micro_batch_samples": "2"})},
}
RUNS = [(ranks, name) for ranks, layouts in ON.items() for name in layouts]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A recipe, a base and documents whose second half is what answers the first."""
    folder = tmp_path_factory.mktemp("contrastive")
    recipe, _ = prepare(folder)
    lengths = np.random.default_rng(1).integers(6, 40, 200).tolist()
    masks = [np.arange(length) >= length // 2 for length in lengths]
    build(folder / "pairs", {"pairs": lengths}, 64, vocab_size=256, masks={"pairs": masks})
    (folder / "pairs/tokenizer").mkdir()
    (folder / "pairs/tokenizer/tokenizer.model").write_bytes(b"stands for a tokenizer")
    config = load_recipe(recipe, {}).model
    save_hf(config, Llama(config, seed=11).state_dict().items(), folder / "base")
    return folder, recipe, str(folder / "pairs"), CONTRASTIVE | {"training.initial_weights": str(folder / "base")}


def plan(setting, ds_config: dict, ranks: int = 1, **more: str):
    folder, recipe, data, overrides = setting
    (folder / "ds.json").write_text(json.dumps(ds_config))
    here = Topology(0, 0, ranks, torch.device("cpu"))
    return make_plan(recipe, overrides | more, str(folder / "ds.json"), data, here)


@pytest.fixture(scope="module")
def reference(setting):
    """Losses of each step and the weights, of plain torch over whole batches, pair by pair."""
    found = plan(setting, zero(0), **WHOLE)
    recipe, folder = found.recipe, setting[0]
    model = Llama(recipe.model, seed=recipe.training.seed)
    model.load_state_dict(dict(load_hf(folder / "base")[1]), strict=False)
    (group,) = parameter_groups(model, recipe.optimizer)
    optimizer = torch.optim.AdamW([group], lr=1.0, betas=recipe.optimizer.betas, eps=recipe.optimizer.eps)
    state, samples, losses = new_state(found), StepSamples(found), []
    for step in range(STEPS):
        (batch,) = samples.after(state)
        state.advance(found.batch.samples, found.step_tokens, applied=True)
        documents = Documents.from_position_ids(batch["position_ids"])
        documents.route(batch["adapters"], 0, None, batch["seeds"])
        hidden, queries, answers = model.hidden_states(batch["input_ids"], documents), [], []
        for row, sides in enumerate(batch["targets"]):
            for pair in range(int(sides.max()) // 2 + 1):
                queries.append(hidden[row, sides == 2 * pair].mean(0))
                answers.append(hidden[row, sides == 2 * pair + 1].mean(0))
        assert len(queries) == batch["num_targets"] > 8
        loss = -torch.stack(
            [
                torch.stack([F.cosine_similarity(query, answer, 0) / 0.1 for answer in answers]).log_softmax(0)[number]
                for number, query in enumerate(queries)
            ]
        ).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(group["params"], recipe.optimizer.max_grad_norm)
        optimizer.param_groups[0]["lr"] = recipe.optimizer.lr * lr_factor(
            recipe.schedule, step + 1, found.total_steps, found.step_tokens
        )
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {key: p.detach().numpy() for key, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def runs(setting, on_ranks):
    folder, recipe, data, overrides = setting

    @kept
    def run(ranks: int, name: str) -> list[dict]:
        config, more = ON[ranks][name]
        arguments = str(folder / f"on{ranks}"), recipe, data, {name: (config, overrides | more)}
        return [rank[name] for rank in on_ranks(ranks, interrupted, *arguments)]

    return run


@pytest.mark.parametrize(("ranks", "name"), RUNS)
def test_a_step_is_that_of_one_process(runs, reference, ranks, name):
    losses, weights = reference
    results = runs(ranks, name)
    np.testing.assert_allclose([step["loss"] for step in results[0]["history"]], losses, rtol=1e-5)
    found = {key: value for rank in results for key, value in rank["weights"].items()}
    assert found.keys() == weights.keys()
    for key, value in weights.items():
        np.testing.assert_allclose(found[key], value, atol=2e-6, rtol=1e-6, err_msg=key)


@pytest.mark.parametrize(("ranks", "name"), RUNS)
def test_a_run_continues_to_the_bit(runs, ranks, name):
    for rank in runs(ranks, name):
        assert rank["history"] == rank["expected"]


def losses_of_pairs(folder: str, recipe: str, data: str, config: dict, overrides: dict) -> list[tuple]:
    """Of the first step, by sample and place among the documents of its row, with that step's loss."""
    run = Run(recipe, data, config, Path(folder), overrides)
    found = document_losses(run.engine, StepSamples(run.plan).after(new_state(run.plan)))
    run.close()
    return [(each.sample, each.place, each.total, each.targets) for each in found]


def test_each_pair_has_its_loss(setting, reference, on_ranks):
    """Named as that document of the row in which it lies, whose answer begins a text of its own in the batch."""
    folder, recipe, data, overrides = setting
    found = on_ranks(2, losses_of_pairs, str(folder / "pairs-2"), recipe, data, zero(2), overrides)
    assert found[0] == found[1]
    alone = plan(setting, zero(0), **WHOLE)
    state = new_state(alone)
    (batch,) = StepSamples(alone).after(state)
    expected, order = {}, order_of(alone, state)
    for sample, sides in zip(batch["samples"].tolist(), batch["targets"], strict=True):
        source, row, _ = order.locate(sample)
        ends = alone.dataset.row(source, row).seg_len.cumsum()
        firsts = [int((sides == 2 * pair).nonzero()[0]) for pair in range(int(sides.max()) // 2 + 1)]
        expected[sample] = [int(np.searchsorted(ends, first, side="right")) for first in firsts]
    assert [(sample, place) for sample, place, *_ in found[0]] == [
        (s, p) for s in sorted(expected) for p in expected[s]
    ]
    assert {targets for *_, targets in found[0]} == {1}
    assert np.mean([total for *_, total, _ in found[0]]) == pytest.approx(reference[0][0], rel=1e-5)
    assert len({total for *_, total, _ in found[0]}) > 8


@pytest.mark.parametrize(
    ("ds_config", "ranks", "more", "sentence"),
    [
        (pipeline(2), 2, {}, "leave pipeline, tensor and sequence parallelism out"),
        (zero(1, **TENSOR), 2, {}, "leave pipeline, tensor and sequence parallelism out"),
        (zero(1, **SEQUENCE), 2, {}, "leave pipeline, tensor and sequence parallelism out"),
        (zero(2), 2, SPLIT, "compares all pairs of a step, which is divided into 2 micro-batches"),
        (
            zero(2),
            1,
            {"adapters.mode": "routed"},
            "trains one adapter on a base that stays: set adapters.mode to single",
        ),
        (zero(2), 1, {"adapters.train_base": "true"}, "trains one adapter on a base that stays"),
        (
            zero(2),
            1,
            {"validation.every_steps": "4"},
            "set it to null, and measure retrieval by tools.embed --evaluate",
        ),
        (zero(2), 1, {"training.z_loss_weight": "1e-4"}, "z_loss_weight has no meaning for the objective contrastive"),
        (zero(2), 1, {"objective.mask_ratio": "0.2"}, "mask_ratio has no meaning for the objective contrastive"),
        (zero(2), 1, {"objective.name": "causal"}, "temperature has no meaning for the objective causal"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(setting, ds_config, ranks, more, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        plan(setting, ds_config, ranks, **(WHOLE if ranks == 1 else {}) | more)


def test_texts_are_no_pairs(setting):
    folder, recipe, _, overrides = setting
    with pytest.raises(ValueError, match="build it with --prompt-field and --response-field"):
        plan((folder, recipe, str(folder / "data"), overrides), zero(0), **WHOLE)
