"""A run starts from another run's weights, whatever layout wrote them, on longer rows with other positions."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from engine.checkpoint.folder import find
from engine.checkpoint.manifest import MANIFEST, seal, steps, unseal
from engine.run.initial_weights import open_source
from engine.run.loop import new_state
from engine.run.plan import make_plan
from engine.run.samples import StepSamples
from launch.topology import Topology
from model.config import ModelConfig
from model.hf.weights import to_hf_state
from model.llama import Llama
from tests.engine.programs import RECIPE, Run, prepare, zero
from tests.training.corpus import build
from tools import export
from tools.trained import load_checkpoint

LENGTH, LONGER = 64, 256  # tokens of a row, before and after
PIPELINE = zero(1, pipeline={"stages": 2, "partition": "flops"})
TENSOR = zero(3, tensor_parallel={"autotp_size": 2})
TIED = {"model.tie_word_embeddings": "true"}
LEARNED = {"model.position_embedding": "learned"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": LENGTH}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LARGE = {"model.initializer_range": "0.3"}  # so that attention, and with it the positions, matter after three steps
SOURCES = {
    "zero3": (zero(3), LARGE),
    "pipeline": (PIPELINE, LARGE | TIED),
    "tensor": (TENSOR, LARGE),
    "learned": (PIPELINE, LARGE | TIED | LEARNED),
}
CONTINUED = {
    # how it goes on: (source, step of its checkpoint or none: the run's folder, DeepSpeed JSON, rotary scaling)
    "zero3-zero3": ("zero3", None, zero(3), YARN),
    "zero3-pipeline": ("zero3", 2, PIPELINE, YARN),
    "pipeline-zero3": ("pipeline", None, zero(3), LINEAR),
    "tensor-zero2": ("tensor", None, zero(2), YARN),
    "learned-zero3": ("learned", None, zero(3), None),
    "learned-tensor": ("learned", 2, TENSOR, None),
}


def longer(folder: Path, name: str) -> dict[str, str]:
    """What a user adds to the command line of the source's run."""
    source, step, _, scaling = CONTINUED[name]
    run = folder / source
    overrides = SOURCES[source][1] | {
        "training.initial_weights": str(run / "checkpoints" / f"step-{step:08d}" if step else run),
        "model.max_position_embeddings": str(LONGER),
        "training.global_batch_tokens": str(4 * LONGER),
        "training.micro_batch_samples": "2",
    }
    return overrides | ({"model.rope_scaling": json.dumps(scaling)} if scaling else {})


def program(folder: str, recipe: str, data: str, long_data: str) -> dict[str, dict]:
    """What a rank does: train every source and save it after 2 and 3 steps; then one step of each continuation."""
    path, results = Path(folder), {}
    for name, (ds_config, overrides) in SOURCES.items():
        run = Run(recipe, data, ds_config, path / name, overrides)
        run.steps(2)
        saved = {2: run.weights()}
        run.save()
        run.steps(1)
        saved[3] = run.weights()
        run.save()
        run.close()
        results[name] = saved
    for name, (_, _, ds_config, _) in CONTINUED.items():
        run = Run(recipe, long_data, ds_config, path / "continued" / name, longer(path, name))
        results[name] = run.steps(2)
        run.close()
    run = Run(recipe, data, zero(2), path / "moved", SOURCES["learned"][1])
    run.restore(path / "learned")
    results["moved"] = run.weights()
    run.close()
    if dist.get_rank() == 0:
        shutil.copytree(path / "zero3", path / "damaged")
        for file in (path / "damaged").rglob("*optim_states.pt"):
            flip(file)
    dist.barrier()
    overrides = {"training.initial_weights": str(path / "damaged")}
    with pytest.raises(ValueError) as refusal:
        Run(recipe, data, zero(2), path / "refused", overrides)
    return results | {"damaged": str(refusal.value)}


def flip(file: Path) -> None:
    """Another byte in the middle; the size stays."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


class Continued(NamedTuple):
    folder: Path
    recipe: str
    data: str
    long_data: str
    ranks: list[dict[str, dict]]

    def weights(self, source: str, step: int) -> dict[str, torch.Tensor]:
        """Those of the live engine when it saved."""
        merged = {name: weight for rank in self.ranks for name, weight in rank[source][step].items()}
        return {name: torch.from_numpy(weight) for name, weight in merged.items()}

    def plan(self, overrides: dict[str, str], data: str | None = None):
        (self.folder / "zero0.json").write_text('{"zero_optimization": {"stage": 0}}')
        alone = Topology(0, 0, 1, torch.device("cpu"))
        return make_plan(self.recipe, overrides, str(self.folder / "zero0.json"), data or self.long_data, alone)

    def refusal(self, overrides: dict[str, str], data: str | None = None) -> list[str]:
        with pytest.raises(ValueError) as refused:
            self.plan(overrides, data)
        return str(refused.value).splitlines()

    def first_batch(self, overrides: dict[str, str]) -> dict[str, torch.Tensor]:
        """All rows of the first optimizer step on the longer data."""
        plan = self.plan(overrides)
        micro_batches = StepSamples(plan).after(new_state(plan))
        return {key: torch.cat([m[key] for m in micro_batches]) for key in ("input_ids", "position_ids", "targets")}


@pytest.fixture(scope="module")
def continued(tmp_path_factory, on_ranks) -> Continued:
    folder = tmp_path_factory.mktemp("initial")
    recipe, data = prepare(folder)
    lengths = {"long": np.random.default_rng(1).integers(40, 700, 40).tolist()}
    long_data = str(folder / "longer")
    build(folder / "longer", lengths, LONGER, vocab_size=256, splits=("train", "validation"))
    ranks = on_ranks(2, program, str(folder), recipe, data, long_data)
    return Continued(folder, recipe, data, long_data, ranks)


def mean_loss(logits_of, batch: dict[str, torch.Tensor]) -> float:
    """Cross-entropy per target of a model that sees one document [1, T] at a time."""
    total, targets = 0.0, 0
    for ids, places, wanted in zip(*batch.values(), strict=True):
        lengths = torch.diff(torch.cat([(places == 0).nonzero().flatten(), torch.tensor([len(places)])])).tolist()
        for part, goal in zip(ids.split(lengths), wanted.split(lengths), strict=True):
            with torch.no_grad():
                total += float(F.cross_entropy(logits_of(part[None])[0], goal, reduction="sum"))
            targets += int((goal >= 0).sum())
    return total / targets


@pytest.mark.parametrize("name", CONTINUED)
def test_the_first_loss_is_that_of_the_old_weights_at_the_new_positions(continued, name):
    source, step, _, scaling = CONTINUED[name]
    overrides = longer(continued.folder, name)
    weights, batch = continued.weights(source, step or 3), continued.first_batch(overrides)
    shape = RECIPE["model"] | {
        "max_position_embeddings": LONGER,
        "tie_word_embeddings": "lm_head.weight" not in weights,
    }
    if scaling:
        config = ModelConfig(**shape, rope_scaling=scaling)
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.to_hf()), dtype=torch.float32).eval()
        theirs.load_state_dict(to_hf_state(weights, config), strict=not config.tie_word_embeddings)
        expected = mean_loss(lambda ids: theirs(ids).logits, batch)
        unscaled = Llama(ModelConfig(**shape))
        unscaled.load_state_dict(weights, strict=not config.tie_word_embeddings)
        assert abs(mean_loss(unscaled, batch) - expected) > 1e-3, "the test would not notice the scaling"
    else:
        ours = Llama(ModelConfig(**shape, position_embedding="learned"))
        weights["embed_positions.weight"] = weights["embed_positions.weight"].repeat(LONGER // LENGTH, 1)
        ours.load_state_dict(weights | {"lm_head.weight": weights["embed_tokens.weight"]})
        expected = mean_loss(ours, batch)
    assert int((batch["position_ids"]).max()) > 3 * LENGTH
    for rank in continued.ranks:
        assert rank[name][0]["loss"] == pytest.approx(expected, rel=1e-5)
        assert rank[name][1]["applied"]


def test_the_step_of_a_checkpoint_is_the_one_taken(continued):
    for source in SOURCES:
        two, three = continued.weights(source, 2), continued.weights(source, 3)
        assert two.keys() == three.keys()
        assert not any(torch.equal(two[key], three[key]) for key in two)
        assert [path.name for path in steps(continued.folder / source)] == ["step-00000003", "step-00000002"]


def test_a_checkpoint_with_learned_positions_moves_and_is_read_but_not_exported(continued, tmp_path):
    """Written by two pipeline stages with tied embeddings, restored under ZeRO-2, opened by the commands."""
    run, saved = continued.folder / "learned", continued.weights("learned", 3)
    found = find(run)
    opened = load_checkpoint(*found, torch.float32, "cpu", {})
    for weights in (continued.ranks[0]["moved"], dict(opened.named_parameters())):
        assert weights.keys() == saved.keys()
        for name, weight in weights.items():
            np.testing.assert_array_equal(torch.as_tensor(weight).detach(), saved[name])
    with pytest.raises(ValueError, match="transformers has no LLaMA with learned positions"):
        export.export(run, *found, tmp_path / "out", torch.float32, 10**9)
    assert not any(tmp_path.iterdir())


def test_damaged_sources_are_passed_over_or_refused_on_every_rank(continued, tmp_path, capsys):
    for rank in continued.ranks:
        assert "every checkpoint is damaged" in rank["damaged"]
    shutil.copytree(continued.folder / "zero3", tmp_path / "run")
    newest = tmp_path / "run/checkpoints/step-00000003"
    flip(next(newest.glob("*optim_states.pt")))
    assert open_source(str(tmp_path / "run"), full=True).checkpoint[0].name == "step-00000002"
    assert "damaged checkpoint passed over" in capsys.readouterr().err
    with pytest.raises(ValueError, match="its content has changed"):
        open_source(str(newest), full=True)
    (newest / MANIFEST).unlink()
    with pytest.raises(ValueError, match="so this is not a finished checkpoint"):
        open_source(str(newest), full=False)


def test_what_does_not_fit_is_refused_before_the_start(continued, tmp_path):
    folder, fitting = continued.folder, longer(continued.folder, "zero3-zero3")
    assert continued.plan(fitting).recipe.model.rope_scaling == YARN
    (line,) = continued.refusal(fitting | {"model.hidden_size": "64"})
    assert (
        line
        == f"training.initial_weights: {folder / 'zero3'} has hidden_size 32 but the recipe's model.hidden_size is 64"
    )
    tied = continued.refusal(fitting | TIED)
    assert tied[0].endswith("has tie_word_embeddings False but the recipe's model.tie_word_embeddings is True")
    (line,) = continued.refusal(fitting | LEARNED | {"model.rope_scaling": "null"})
    assert line.endswith("has position_embedding 'rope' but the recipe's model.position_embedding is 'learned'")
    silent = {key: value for key, value in YARN.items() if key != "original_max_position_embeddings"}
    (line,) = continued.refusal(fitting | {"model.rope_scaling": json.dumps(silent)})
    assert f"would be model.max_position_embeddings, {LONGER}, but" in line
    assert line.endswith(f"was trained for {LENGTH} positions: give it")
    short = continued.refusal(fitting | {"model.max_position_embeddings": "128"})
    assert "model.max_position_embeddings is 128 but the rows" in short[0]
    for path, reason in (
        (tmp_path, "is neither a Hugging Face folder (no config.json) nor a run (no checkpoints) nor a checkpoint"),
        (continued.long_data, "is neither a Hugging Face folder"),
    ):
        assert reason in continued.refusal(fitting | {"training.initial_weights": str(path)})[0]
    (tmp_path / "checkpoints").mkdir()
    assert "has no checkpoint yet" in continued.refusal(fitting | {"training.initial_weights": str(tmp_path)})[0]


def test_a_run_on_another_tokenizer_is_refused(continued, tmp_path):
    shutil.copytree(continued.folder / "zero3", tmp_path / "run")
    for file in tmp_path.glob(f"run/checkpoints/*/{MANIFEST}"):
        manifest = unseal(file.read_bytes())
        manifest.data["tokenizer"]["sha256"] = "f" * 64
        file.write_bytes(seal(manifest))
    fitting = longer(continued.folder, "zero3-zero3") | {"training.initial_weights": str(tmp_path / "run")}
    (line,) = continued.refusal(fitting)
    assert f"{tmp_path / 'run'} was trained with another tokenizer than {continued.long_data}" in line
