"""What a rank does in the engine's tests: runs of a tiny model through the very functions that train.py calls."""

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from engine.checkpoint.folder import agree_on_checkpoint
from engine.checkpoint.saving import save
from engine.layer_statistics import Figures
from engine.layout.names import named_parameters
from engine.layout.slices import cut_dimensions, join
from engine.process_group import start_process_group
from engine.run.begin import begin
from engine.run.folder import describe
from engine.run.plan import make_plan
from engine.run.resume import restore
from engine.run.validation import validate_all
from launch.topology import read_topology
from model.llama import RMSNorm
from tests.gloo import share_device
from tests.processes import ROOT
from tests.training.corpus import build
from training.state import TrainState

RECIPE = {
    "model": {
        "vocab_size": 256,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    },
    "training": {
        "global_batch_tokens": 512,
        "micro_batch_samples": 4,
        "max_steps": 8,
        "z_loss_weight": 1e-4,
        "seed": 3,
    },
    "optimizer": {"lr": 3e-3, "max_grad_norm": 0.5},
    "schedule": {"schedule": "wsd", "warmup_steps": 2, "decay_steps": 3},
    "validation": {"every_steps": 4, "max_samples": 20},
    "checkpoint": {"every_steps": 4},
    "logging": {"log_every_steps": 1, "wandb": False, "layer_statistics_every_steps": 5},
}
AUTO = dict.fromkeys(
    ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
)
DEEP, FLAT = ({"model.num_hidden_layers": blocks} for blocks in ("4", "2"))
"""Each rank of a pipeline holds some blocks; in the other layouts two show what every block is like."""
BUCKET = 5000
BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}


def zero(stage: int, **more) -> dict:
    """A JSON of this stage with buckets so small that even a tiny model needs several; stage 3 partitions everything."""
    sizes = {"reduce_bucket_size": BUCKET} if stage else {}
    sizes |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": BUCKET} if stage == 3 else {}
    return AUTO | {"zero_optimization": {"stage": stage, **sizes, **more.pop("zero", {})}} | more


def depth(config: dict) -> dict[str, str]:
    return DEEP if "pipeline" in config else FLAT


def shipped(bucket: int | str = BUCKET) -> dict[str, tuple[int, dict]]:
    """Every JSON of `ds_configs` on the ranks of a small launch: 2, or as many as it takes to give each open degree 2.

    `bucket`: the size of buckets that the JSON leaves open, which "auto" makes as small as one matrix of a tiny model.
    """
    found = {}
    for file in sorted((ROOT / "ds_configs").glob("*.json")):
        config = json.loads(file.read_text())
        sections = [(config.get("pipeline", {}), "stages"), (config.get("tensor_parallel", {}), "autotp_size")]
        open_degrees = [(s, key) for s, key in [*sections, (config, "sequence_parallel_size")] if s.get(key) == "auto"]
        if len(open_degrees) > 1:
            for section, key in open_degrees:
                section[key] = 2
        section = config.get("zero_optimization", {})
        section |= {key: bucket for key in section if key.endswith("_bucket_size") and section[key] == "auto"}
        found[file.stem] = 2 ** max(len(open_degrees), 1), config
    return found


def prepare(folder: Path, blocks: int = 4) -> tuple[str, str]:
    """A recipe file and a data set of documents shorter and longer than a row; returns their paths."""
    rng = np.random.default_rng(0)
    lengths = {"long": rng.integers(40, 300, 40).tolist(), "short": rng.integers(4, 60, 60).tolist()}
    build(folder / "data", lengths, 64, vocab_size=256, splits=("train", "validation"), weights={"long": 3, "short": 1})
    (folder / "data/tokenizer").mkdir()
    (folder / "data/tokenizer/tokenizer.model").write_bytes(b"stands for a tokenizer")
    validation = RECIPE["validation"] | {"sets": {"again": str(folder / "data")}}
    model = RECIPE["model"] | {"num_hidden_layers": blocks}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"model": model, "validation": validation}))
    return str(folder / "recipe.yaml"), str(folder / "data")


class Poison(NamedTuple):
    """A number that is not finite, on one rank and in one micro-batch of a step."""

    value: float
    rank: int
    micro_batch: int
    in_gradient: bool
    """Whether the loss stays finite and only what flows back from it is poisoned."""

    @contextlib.contextmanager
    def given_to(self, engine, micro_batches: int) -> Iterator[None]:
        """Within this context the last norm that the rank holds gives, or gets back, the value."""
        *_, norm = (module for module in engine.module.modules() if isinstance(module, RMSNorm))
        turns = iter(number == self.micro_batch % micro_batches for number in range(micro_batches))

        def spoil(module, inputs, output):
            if not next(turns):
                return output
            if not self.in_gradient:
                return output * self.value
            output.register_hook(lambda gradient: gradient * self.value)
            return output

        hook = norm.register_forward_hook(spoil)
        yield
        hook.remove()


def join_process_group() -> None:
    """The group that the ranks of a test run keep from call to call."""
    if not torch.distributed.is_initialized():
        share_device()
        start_process_group(read_topology())


class Run:
    """One engine and its data, stepped by hand."""

    def __init__(self, recipe: str, data: str, ds_config: dict, folder: Path, overrides: dict | None = None):
        self.topology, self.folder = read_topology(), folder
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"ds-{self.topology.rank}.json"
        file.write_text(json.dumps(ds_config))
        self.plan = make_plan(recipe, overrides or {}, str(file), data, self.topology)
        join_process_group()
        self.loop = begin(self.plan)
        self.engine = self.loop.engine
        self.layers: dict[int, Figures] = {}
        """By step."""

    def steps(self, count: int, poison: "Poison | None" = None) -> list[dict]:
        """Train, the activations or gradients of every step poisoned if so asked."""
        history = []
        for _ in range(count):
            micro_batches = self.plan.stage_of(self.state.step + 1).batch.accumulation
            poisoned = poison is not None and self.topology.rank == poison.rank % self.topology.world_size
            with poison.given_to(self.engine, micro_batches) if poisoned else contextlib.nullcontext():
                done = self.loop.step()
            if done.layers is not None:
                self.layers[self.state.step] = done.layers
            rows = torch.cat([batch["input_ids"] for batch in done.micro_batches]).numpy()
            ids = sorted(hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest() for row in rows)
            history.append(done.result._asdict() | {"step": self.state.step, "rows": ids})
        return history

    @property
    def state(self) -> TrainState:
        return self.loop.state

    def weights(self) -> dict[str, np.ndarray]:
        """What is trained, whole and in float32, by name, whatever the stage; in a pipeline that of this rank's layers."""
        from deepspeed.utils import safe_get_full_fp32_param

        named = [(name, p) for name, p in named_parameters(self.engine.module) if p.requires_grad]
        partitioned = self.engine.zero_stage > 0
        full = {name: safe_get_full_fp32_param(p) if partitioned else p.detach() for name, p in named}
        held = {name: tensor.float().cpu().clone() for name, tensor in full.items()}
        parts, mesh, dimensions = [held], self.plan.mesh, cut_dimensions(self.plan.recipe.model)
        if mesh.tensor > 1:
            of_ranks: list = [None] * mesh.world_size
            torch.distributed.all_gather_object(of_ranks, held)
            parts = of_ranks[mesh.rank - mesh.tensor_rank :][: mesh.tensor]
        return {name: join([part[name] for part in parts], dimensions[name]).numpy() for name in held}

    def save(self) -> Path:
        return save(self.engine, self.folder, self.state, describe(self.plan))

    def restore(self, folder: Path | None = None) -> None:
        found, damaged = agree_on_checkpoint(folder or self.folder)
        assert not damaged
        self.loop.state = restore(self.engine, *found)

    def close(self) -> None:
        self.engine.close()


def stopped(
    folder: str, recipe: str, data: str, configs: dict[str, tuple[dict, dict]], steps: int, stops: tuple[int, ...]
) -> dict[str, dict]:
    """Per (ds_config, overrides): all steps in one go; and with a checkpoint and a fresh engine at each of the stops."""
    results = {}
    for name, (ds_config, overrides) in configs.items():
        mathematics = {key: value for key, value in overrides.items() if not key.startswith("data.")}
        run = Run(recipe, data, ds_config, Path(folder) / "whole" / name, mathematics)
        whole = run.steps(steps)
        results[name] = {"whole": whole, "weights": run.weights(), "validation": validate_all(run.engine, run.plan)}
        run.close()
        history, before = [], 0
        for stop in (*stops, steps) if stops else ():
            run = Run(recipe, data, ds_config, Path(folder) / f"stopped-{stop}" / name, overrides)
            if before:
                run.restore(Path(folder) / f"stopped-{before}" / name)
            history += run.steps(stop - before)
            run.save()
            run.close()
            before = stop
        results[name] |= {"history": history, "state": run.state.model_dump()}
    return results


def moved_at(
    folder: str,
    recipe: str,
    data: str,
    pairs: list[tuple[str, str]],
    configs: dict[str, tuple[dict, dict]],
    steps: int,
    stops: tuple[int, ...],
) -> dict[tuple[str, str, int], list[dict]]:
    """Per (source, target) and stop: an engine of the target's config continues what `stopped` saved there, to the end."""
    results = {}
    for source, target in pairs:
        for stop in stops:
            run = Run(
                recipe, data, configs[target][0], Path(folder) / "moved" / f"{source}-{target}", configs[target][1]
            )
            run.restore(Path(folder) / f"stopped-{stop}" / source)
            results[source, target, stop] = run.steps(steps - stop)
            run.close()
    return results


def histories(folder: str, recipe: str, data: str, runs: dict[str, tuple[dict, dict]], steps: int) -> dict[str, dict]:
    """Each named (ds_config, overrides) from the same start: its history, weights and validation."""
    results = {}
    for name, (ds_config, overrides) in runs.items():
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            run = Run(recipe, data, ds_config, Path(folder) / name, overrides)
        parameters = list(run.engine.module.parameters())
        held = sum(getattr(p, "ds_tensor", p).numel() for p in parameters)
        history = run.steps(steps)
        results[name] = {
            "history": history,
            "weights": run.weights(),
            "layers": run.layers,
            "validation": validate_all(run.engine, run.plan),
            "held_parameters": held,
            "all_parameters": run.plan.recipe.model.num_parameters(),
            "printed": printed.getvalue(),
        }
        run.close()
    return results


def stopped_once(
    folder: str, recipe: str, data: str, ds_config: dict, overrides: dict
) -> list[tuple[list[dict], dict]]:
    """History and weights of a step after a checkpoint: of the engine that wrote it, and of a fresh one that restores it."""
    ends = []
    for first in (True, False):
        run = Run(recipe, data, ds_config, Path(folder), overrides)
        if first:
            run.steps(1)
            run.save()
        else:
            run.restore()
        ends.append((run.steps(1), run.weights()))
        run.close()
    return ends


def interrupted(folder: str, recipe: str, data: str, configs: dict[str, tuple[dict, dict]]) -> dict[str, dict]:
    """Per (ds_config, overrides): 4 steps and a checkpoint; from there 4 more of the same engine, and of a fresh one.

    What reads ahead is compared with what does not.
    """
    results = {}
    for name, (ds_config, overrides) in configs.items():
        mathematics = {key: value for key, value in overrides.items() if not key.startswith("data.")}
        first = Run(recipe, data, ds_config, Path(folder) / name, overrides)
        history = first.steps(4)
        first.save()
        expected = history + first.steps(4)
        first.close()
        if mathematics != overrides:
            whole = Run(recipe, data, ds_config, Path(folder) / "whole" / name, mathematics)
            expected = whole.steps(8)
            whole.close()
        second = Run(recipe, data, ds_config, Path(folder) / name, overrides)
        second.restore()
        history += second.steps(4)
        results[name] = {"expected": expected, "history": history, "weights": second.weights()}
        second.close()
    return results


def continued(
    folder: str, recipe: str, data: str, configs: dict[str, tuple[dict, dict]], steps: int
) -> dict[str, dict]:
    """Per (ds_config, overrides): restore the newest checkpoint, whatever wrote it, train on and save."""
    results = {}
    for name, (ds_config, overrides) in configs.items():
        run = Run(recipe, data, ds_config, Path(folder) / name, overrides)
        run.restore()
        groups = [(g["weight_decay"], len(g["params"])) for g in run.engine.optimizer.param_groups]
        results[name] = {"history": run.steps(steps), "weights": run.weights(), "groups": groups}
        run.save()
        run.close()
    return results


def moved(folder: str, recipe: str, data: str, pairs: list[tuple[str, str]], configs: dict, steps: int) -> dict:
    """Per (source, target): an engine of the target's config continues the checkpoint that the source's run wrote."""
    results = {}
    for source, target in pairs:
        ds_config, overrides = configs[target]
        run = Run(recipe, data, ds_config, Path(folder) / "moved" / f"{source}-{target}", overrides)
        run.restore(Path(folder) / source)
        results[source, target] = {"history": run.steps(steps), "weights": run.weights()}
        run.close()
    return results


def flat(scores: dict[str, Any]) -> dict[str, float]:
    """Of a validation set, with the loss of each source among them."""
    return {**scores, **scores["loss_by_source"], "loss_by_source": 0.0}
