"""What DeepSpeed itself takes in a step beside what layers compute and ranks send: a narrow model through its engine and without.

Its hooks, gathers and bookkeeping take time for each parameter, however small it is. So two blocks of a few elements are trained
by an engine of each stage of ZeRO and by torch alone, and what an engine takes longer is its own.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from engine.build import build_engine
from engine.engine import Engine
from engine.layout.mesh import Mesh
from engine.run.memory import has_half_weights
from engine.run.plan import RunPlan
from model.llama import Llama
from planner.rates import EngineCost
from training.batch import Batch
from training.config import Recipe

BLOCKS, TOKENS, WIDTH, VOCABULARY = 2, 16, 16, 64
SIZES = (
    (1, "reduce_bucket_size", 2, 1.0),
    (3, "stage3_prefetch_bucket_size", 2, 0.9),
    (3, "stage3_param_persistence_threshold", 1, 10),
)
"""Elements: from which stage on they count, with which power of the width they grow, and what `auto` makes of it."""
Probe = tuple[str, Callable[[], Any]]


class EngineProbe:
    """Engines of some stages of ZeRO on all ranks as replicas. Collective over all ranks."""

    def __init__(self, plan: RunPlan, device: torch.device, stages: tuple[int, ...]) -> None:
        recipe, mesh = _narrow(plan.recipe), Mesh(plan.mesh.rank, plan.mesh.world_size)
        dtype = torch.bfloat16 if has_half_weights(plan) else torch.float32
        self._plain = Llama(recipe.model, 0).to(device, dtype)
        self._engines = {stage: build_engine(recipe, _config(plan, stage), mesh, []) for stage in stages}
        self._batch = Batch(
            input_ids=torch.ones(1, TOKENS, dtype=torch.int64),
            position_ids=torch.arange(TOKENS)[None],
            targets=torch.ones(1, TOKENS, dtype=torch.int64),
            num_targets=TOKENS,
        )
        self._device, self._tensors = device, len(list(self._plain.parameters()))

    def probes(self) -> Iterator[Probe]:
        """Names and acts, to be timed: the model alone, and steps of one and of two micro-batches of each engine."""
        yield "engine plain", self._alone
        for stage, engine in self._engines.items():
            for micro_batches in (1, 2):
                yield f"engine {stage} {micro_batches}", partial(self._step, engine, micro_batches)

    def _alone(self) -> None:
        batch = {key: self._batch[key].to(self._device) for key in ("input_ids", "targets")}
        self._plain(position_ids=self._batch["position_ids"], **batch)[0].backward()

    def _step(self, engine: Engine, micro_batches: int) -> None:
        engine.fit((1, TOKENS), micro_batches)
        engine.update([self._batch] * micro_batches, 0.0, 1.0 / TOKENS)

    def costs(self, found: Mapping[str, float]) -> dict[int, EngineCost]:
        """By stage, from the seconds of each probe."""
        costs = {}
        for stage in self._engines:
            one, two = (found[f"engine {stage} {micro_batches}"] for micro_batches in (1, 2))
            micro = max(0.0, min(one, two - one) - found["engine plain"]) / self._tensors
            costs[stage] = EngineCost(micro, max(0.0, 2 * one - two) / self._tensors)
        return costs


def _narrow(recipe: Recipe) -> Recipe:
    model = recipe.model
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": max(1, model.intermediate_size * WIDTH // model.hidden_size),
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": WIDTH // 2,
        "max_position_embeddings": TOKENS,
    }
    narrow = model.model_copy(update=sizes | {"adapters": type(model.adapters)(), "rope_scaling": None})
    training = recipe.training.model_copy(update={"activation_checkpointing": False, "compile": False})
    parts = {"objective": type(recipe.objective)(), "adapters": type(recipe.adapters)()}
    return recipe.model_copy(update={"model": narrow, "training": training, **parts})


def _config(plan: RunPlan, stage: int) -> dict[str, Any]:
    """The JSON of an engine of this stage, in the precision of the plan, with buckets that hold as many parameters as its own."""
    kept = {key: plan.ds_config[key] for key in ("bf16", "data_types", "gradient_clipping") if key in plan.ds_config}
    zero: dict[str, Any] = {"stage": stage}
    width, given = plan.recipe.model.hidden_size, plan.ds_config.get("zero_optimization", {})
    for first, key, power, usual in SIZES:
        if stage >= first:
            zero[key] = max(1, int(given.get(key, usual * width**power) * (WIDTH / width) ** power))
    sizes = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    return kept | sizes | {"train_batch_size": plan.mesh.world_size, "zero_optimization": zero}
