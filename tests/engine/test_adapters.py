"""Adapters that are trained together end as each would alone, in every layout, and continue from small checkpoints."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.run.loop import new_state
from engine.run.plan import make_plan
from engine.run.samples import StepSamples
from launch.topology import Topology
from model.adapter_config import adapter_of
from model.hf.peft import save_peft
from model.hf.weights import load_hf, save_hf
from model.llama import Llama
from tests.engine.kept import kept
from tests.engine.programs import BF16, Run, interrupted, moved, prepare, zero
from tests.engine.test_layouts import KEYS, OFFLOAD, RECOMPUTE, ROWS, SEQUENCE, SPLIT, TENSOR, pipeline
from training.config import load_recipe
from training.optimizer import parameter_groups
from training.schedule import lr_factor

STEPS = 8
ADAPTERS = {"adapters.names": "[long, short]", "adapters.r": "{long: 4, short: 2}", "adapters.lora_alpha": "16"}
ADAPTERS |= {"optimizer.lr": "1e-3", "optimizer.eps": "1e-6"}  # at 1e-8 a gradient that is only rounding moves a weight
ON = {
    1: {"zero0": (zero(0), {})},
    2: {
        **{f"zero{stage}": (zero(stage), {}) for stage in range(4)},
        "zero2-accumulate-recompute": (zero(2), SPLIT | RECOMPUTE),
        "zero3-dropout": (zero(3), {"adapters.lora_dropout": "0.2"}),
        "zero3-offload": (zero(3, zero={"offload_optimizer": OFFLOAD, "offload_param": OFFLOAD}), {}),
        "pipeline2-accumulate": (pipeline(2), SPLIT),
        "sequence2-zero1": (zero(1, **SEQUENCE), {}),
        "keys2-zero3": (zero(3, **KEYS), {}),
        "tensor2-zero0": (zero(0, **TENSOR), {}),
        "rows2-zero2-recompute": (zero(2, **ROWS), RECOMPUTE),
        "tensor2-zero3": (zero(3, **TENSOR), {}),
    },
    4: {
        "pipeline2-tensor2": (pipeline(2, **TENSOR), {}),
        "pipeline2-sequence2": (pipeline(2, **SEQUENCE), {}),
        "rows2-sequence2-zero3": (zero(3, **ROWS, **SEQUENCE), {}),
    },
}
FLOAT32_RUNS = [(ranks, name) for ranks, layouts in ON.items() for name in layouts]
TIED_BASE = {"model.tie_word_embeddings": "true", "training.initial_weights": "null"}
ON[2] |= {
    "zero1-bf16": (zero(1, **BF16), {}),
    "pipeline2-tied-bf16": (pipeline(2, **BF16), TIED_BASE),
    "pipeline2-last": (pipeline(2), {"adapters.last_layers": "3"}),
    "zero3-with-base": (zero(3), {"adapters.train_base": "true"}),
    "pipeline2-with-base": (pipeline(2), {"adapters.train_base": "true"}),
}
RUNS = [(ranks, name) for ranks, layouts in ON.items() for name in layouts]
MOVES = {
    2: [
        ("zero0", "zero3"),
        ("zero3", "pipeline2-accumulate"),
        ("pipeline2-accumulate", "tensor2-zero3"),
        ("tensor2-zero3", "keys2-zero3"),
        ("keys2-zero3", "zero0"),
        ("zero3-with-base", "pipeline2-with-base"),
    ],
    4: [("zero2", "pipeline2-tensor2"), ("pipeline2-tensor2", "rows2-sequence2-zero3")],
}
"""From a checkpoint of the one layout on 2 ranks, or on as many as here, to the other."""


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    recipe, data = prepare(folder)
    config = load_recipe(recipe, {}).model
    save_hf(config, Llama(config, seed=11).state_dict().items(), folder / "base")
    return folder, recipe, data, ADAPTERS | {"training.initial_weights": str(folder / "base")}


@pytest.fixture(scope="module")
def alone(setting):
    return kept(lambda more: trained_alone(setting, dict(more)))


def trained_alone(setting, more: dict[str, str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Losses per step and weights of each adapter trained by plain torch on its own rows, without the other."""
    folder, recipe_file, data, overrides = setting
    overrides = overrides | more
    (folder / "zero0.json").write_text('{"zero_optimization": {"stage": 0}}')
    plan = make_plan(recipe_file, overrides, str(folder / "zero0.json"), data, Topology(0, 0, 1, torch.device("cpu")))
    recipe, names, weights, losses = plan.recipe, plan.recipe.adapters.names, {}, np.zeros(STEPS)
    targets = np.zeros(STEPS)
    for number, name in enumerate(names):
        only = recipe.adapters.model_copy(update={"names": (name,)})
        model = Llama(recipe.model.model_copy(update={"adapters": only}), seed=recipe.training.seed)
        model.load_state_dict(dict(load_hf(folder / "base")[1]), strict=False)
        (group,) = parameter_groups(model, recipe.optimizer)
        options = {"betas": recipe.optimizer.betas, "eps": recipe.optimizer.eps}
        optimizer = torch.optim.AdamW([group], lr=1.0, **options)
        state, samples = new_state(plan), StepSamples(plan)
        for step in range(STEPS):
            batches = samples.after(state)
            state.advance(plan.batch.samples, plan.step_tokens, applied=True)
            keys = {"input_ids", "position_ids", "targets", "adapters", "seeds"} & batches[0].keys()
            whole = {key: torch.cat([batch[key] for batch in batches]) for key in keys}
            rows = (whole.pop("adapters") == number).nonzero().flatten()
            if not len(rows):
                continue
            own = {key: values[rows] for key, values in whole.items()}
            objective, sums = model(**own, adapters=rows * 0, z_loss_weight=recipe.training.z_loss_weight)
            count = int((own["targets"] >= 0).sum())
            (objective / count).backward()
            torch.nn.utils.clip_grad_norm_(group["params"], recipe.optimizer.max_grad_norm)
            factor = lr_factor(recipe.schedule, step + 1, plan.total_steps, plan.step_tokens)
            optimizer.param_groups[0]["lr"] = recipe.optimizer.lr * factor
            optimizer.step()
            optimizer.zero_grad()
            losses[step] += float(sums[0])
            targets[step] += count
        weights |= {key: p.detach().numpy() for key, p in model.named_parameters() if adapter_of(key)}
    return losses / targets, weights


@pytest.fixture(scope="module")
def runs(setting, on_ranks):
    folder, recipe, data, overrides = setting

    @kept
    def run(ranks: int, name: str) -> list[dict]:
        config, more = ON[ranks][name]
        arguments = str(folder / f"world{ranks}"), recipe, data, {name: (config, overrides | more)}
        return [rank[name] for rank in on_ranks(ranks, interrupted, *arguments)]

    return run


@pytest.mark.parametrize(("ranks", "name"), FLOAT32_RUNS)
def test_each_adapter_ends_as_it_would_alone(runs, alone, ranks, name):
    dropout = {key: value for key, value in ON[ranks][name][1].items() if key == "adapters.lora_dropout"}
    losses, weights = alone(tuple(dropout.items()))
    results = runs(ranks, name)
    found = {key: value for rank in results for key, value in rank["weights"].items()}
    assert found.keys() == weights.keys()
    for key, value in weights.items():
        np.testing.assert_allclose(found[key], value, atol=1e-6, rtol=1e-6, err_msg=key)
    np.testing.assert_allclose([step["loss"] for step in results[0]["history"]], losses, rtol=1e-6)


@pytest.mark.parametrize(("ranks", "name"), RUNS)
def test_a_run_continues_to_the_bit(runs, ranks, name):
    for rank in runs(ranks, name):
        assert rank["history"] == rank["expected"]


@pytest.mark.parametrize(("ranks", "source", "target"), [(ranks, *pair) for ranks in MOVES for pair in MOVES[ranks]])
def test_a_run_continues_in_another_layout(setting, runs, on_ranks, ranks, source, target):
    folder, recipe, data, overrides = setting
    before = ranks if source in ON[ranks] else 2
    expected = runs(before, source)[0]
    here = folder / f"world{ranks}"
    if before != ranks:
        shutil.copytree(folder / f"world{before}" / source, here / source)
    configs = {target: (ON[ranks][target][0], overrides | ON[ranks][target][1])}
    results = [
        rank[source, target] for rank in on_ranks(ranks, moved, str(here), recipe, data, [(source, target)], configs, 4)
    ]
    for mine, theirs in zip(results[0]["history"], expected["expected"][4:], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert mine["rows"] == theirs["rows"] or ranks > 1
    found = {key: value for rank in results for key, value in rank["weights"].items()}
    weights = {key: value for rank in runs(before, source) for key, value in rank["weights"].items()}
    for key, value in weights.items():
        np.testing.assert_allclose(found[key], value, atol=2e-6, rtol=1e-6, err_msg=key)


def start_from(folder: str, recipe: str, data: str, ds_configs: dict[str, dict], overrides: dict) -> dict[str, dict]:
    """By layout: the weights before the first step."""
    found = {}
    for name, ds_config in ds_configs.items():
        run = Run(recipe, data, ds_config, Path(folder) / "start" / name, overrides)
        found[name] = run.weights()
        run.close()
    return found


def test_an_adapter_of_pefts_is_where_a_run_begins(setting, on_ranks):
    folder, recipe, data, overrides = setting
    config = load_recipe(recipe, ADAPTERS).model
    other = Llama(config, seed=77)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.arange(parameter.numel()).view_as(parameter))
    save_peft(config, "short", other.state_dict(), folder / "peft", None)
    overrides = overrides | {"adapters.initial_weights": f"{{short: {folder}/peft}}"}
    layouts = {name: ON[2][name][0] for name in ("zero2", "tensor2-zero3")}
    results = on_ranks(2, start_from, str(folder), recipe, data, layouts, overrides)
    for name in layouts:
        for key, value in results[0][name].items():
            if adapter_of(key) == "short":
                np.testing.assert_array_equal(value, other.get_parameter(key).detach().numpy())
            elif "lora_B" in key:
                assert not value.any()


def on_another_base(folder: str, recipe: str, data: str, overrides: dict, source: str) -> str:
    run = Run(recipe, data, zero(2), Path(folder) / "other", overrides)
    try:
        run.restore(Path(source))
    except ValueError as error:
        return str(error)
    finally:
        run.close()
    return "it was restored"


def test_another_base_is_refused(setting, runs, on_ranks):
    folder, recipe, data, overrides = setting
    runs(2, "zero2")
    config = load_recipe(recipe, {}).model
    save_hf(config, Llama(config, seed=12).state_dict().items(), folder / "other-base")
    other = overrides | {"training.initial_weights": str(folder / "other-base")}
    said = on_ranks(2, on_another_base, str(folder), recipe, data, other, str(folder / "world2/zero2"))
    for sentence in said:
        assert "trained on other weights than those of training.initial_weights" in sentence


def saved_bytes(folder: str, recipe: str, data: str, stages: list[int], overrides: dict) -> dict[int, tuple[int, int]]:
    """By ZeRO stage: bytes of a checkpoint after a step, and of the trained weights and their moments in float32."""
    sizes = {}
    for stage in stages:
        run = Run(recipe, data, zero(stage), Path(folder) / f"size{stage}", overrides)
        run.steps(1)
        saved = sum(file.stat().st_size for file in run.save().iterdir())
        sizes[stage] = saved, run.plan.recipe.model.num_trained_parameters() * 12
        run.close()
    return sizes


def test_checkpoints_hold_little_but_adapters_and_their_states(setting, on_ranks):
    folder, recipe, data, overrides = setting
    wide = {"model.hidden_size": "256", "model.intermediate_size": "512", "model.num_hidden_layers": "2"}
    wide |= {"adapters.r": "64", "training.initial_weights": "null"}
    sizes = on_ranks(2, saved_bytes, str(folder), recipe, data, [0, 2, 3], overrides | wide)[0]
    for saved, needed in sizes.values():
        assert needed < saved < 1.05 * needed
