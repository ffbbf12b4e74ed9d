"""From a recipe, a filled JSON and a mesh to the engine that trains."""

import contextlib
import io
import sys
import threading
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist

from engine.engine import Engine, PipelineEngine
from engine.layout.mesh import Mesh
from engine.layout.names import named_parameters
from engine.layout.pipeline import PipelinedLlama, QueuedLoss
from engine.layout.sequence import share_rows
from engine.layout.tensor import divide_vocabulary, for_autotp, sum_gradients_once
from engine.optimizer import build_optimizer
from engine.reduction.compression import compressed_reduction
from model.llama import Block, Llama
from model.positions import resize_positions
from training.config import Recipe
from training.optimizer import Lion

ANNOUNCED_SECONDS = 2.0


def build_engine(
    recipe: Recipe,
    ds_config: dict[str, Any],
    mesh: Mesh,
    pipeline_bounds: list[int],
    weights: Iterator[tuple[str, torch.Tensor]] | None = None,
) -> Engine:
    """The model in the layout of the JSON, with the same initial weights in every layout. Collective over all ranks.

    `weights`: names in the layer plan and whole tensors, in the place of random ones. The first rank says so when it
    takes long.
    """
    late = threading.Timer(ANNOUNCED_SECONDS, print, ("building the model ...",), {"file": sys.stdout, "flush": True})
    late.daemon = True
    if mesh.rank == 0:
        late.start()
    try:
        return _build_engine(recipe, dict(ds_config), mesh, pipeline_bounds, weights)
    finally:
        late.cancel()


def _build_engine(
    recipe: Recipe,
    config: dict[str, Any],
    mesh: Mesh,
    bounds: list[int],
    weights: Iterator[tuple[str, torch.Tensor]] | None,
) -> Engine:
    compression, loss = config.pop("gradient_compression", None), QueuedLoss()
    model: Llama | PipelinedLlama
    if bounds:
        model = PipelinedLlama(recipe, bounds, loss)
        config["pipeline"] = {"use_reentrant": False}
    else:
        if mesh.tensor > 1:
            config = for_autotp(config, recipe.model)
        zero_stage = config.get("zero_optimization", {}).get("stage", 0)
        with deepspeed.zero.Init(config_dict_or_path=config, enabled=zero_stage == 3):
            model = Llama(recipe.model, seed=recipe.training.seed)
        model.activation_checkpointing = recipe.training.activation_checkpointing
    if config.pop("sequence_parallel_size", 1) > 1:
        share_rows(model, mesh)
        config["train_batch_size"] *= mesh.sequence  # DeepSpeed counts every rank's micro-batch as other rows
    if weights is not None:
        load_weights(model, weights, recipe)
    if mesh.tensor > 1:
        divide_vocabulary(model, mesh)
    if recipe.training.compile:
        compile_blocks(model)
    optimizer = build_optimizer(model, recipe.optimizer, config)
    if isinstance(optimizer, Lion):
        config["zero_allow_untested_optimizer"] = True  # DeepSpeed has not tested this one; tests/engine has
    if hasattr(optimizer, "max_grad_norm"):
        config["gradient_clipping"] = 0.0  # this optimizer clips by itself, after measuring
    with contextlib.redirect_stdout(io.StringIO()):  # the bf16 optimizer prints its memory, whatever the log level
        wrapped, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    if mesh.tensor > 1 and not config["tensor_parallel"].get("tp_overlap_comm"):
        sum_gradients_once(model)
    reduction, visibility = compressed_reduction(wrapped, compression), recipe.model.visibility
    if bounds:
        return PipelineEngine(wrapped, mesh, visibility, reduction, loss, bounds)
    return Engine(wrapped, mesh, visibility, reduction)


def load_weights(model: torch.nn.Module, weights: Iterator[tuple[str, torch.Tensor]], recipe: Recipe) -> None:
    """Copy weights into the model, one tensor at a time, partitioned or not. Collective over all ranks.

    A table of learned positions takes the recipe's length (`resize_positions`).
    """
    parameters = dict(named_parameters(model))
    for name, tensor in weights:
        if name not in parameters:  # on another rank of the pipeline
            continue
        if name == "embed_positions.weight":
            tensor = resize_positions(tensor, recipe.model.max_position_embeddings)
        parameter = parameters.pop(name)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if parameter.numel() and (not hasattr(parameter, "ds_id") or dist.get_rank() == 0):
                parameter.copy_(tensor)
    assert not parameters, f"there are no weights for {sorted(parameters)}"


def compile_blocks(model: torch.nn.Module, backend: str = "inductor") -> None:
    """`torch.compile` every block in place; parameters keep their names, and all blocks share one compilation."""
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(backend=backend)
