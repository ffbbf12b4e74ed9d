"""From a recipe, a filled JSON and a mesh to the engine that trains."""

import contextlib
import io
import sys
import threading
from collections.abc import Iterable
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from engine.attention_kernel import attends_by_products
from engine.engine import Engine, PipelineEngine
from engine.layout.exchange import gather_uneven
from engine.layout.groups import Groups
from engine.layout.mesh import EXCHANGE, Mesh
from engine.layout.names import named_parameters
from engine.layout.pipeline import Builder, PipelinedLlama, QueuedLoss, recomputed_blocks
from engine.layout.sequence import losses_of_whole_rows, share_rows
from engine.layout.slices import cut_dimensions, slice_of
from engine.layout.tensor import Parts, divide_layer
from engine.matrices import names_of_matrices, place_matrices
from engine.optimizer import Guarded, build_optimizer
from engine.reduction.compression import compressed_reduction
from engine.separate import place_groups
from model.adapter_config import adapter_of
from model.attention import use_products
from model.contrast import TEMPERATURE, Contrast
from model.llama import Block, Layer, Llama
from model.positions import resize_positions
from training.config import Recipe
from training.learned_prior import LearnedPrior
from training.muon import Muon
from training.optimizer import Lion
from training.separate_adamw import SeparateAdamW

ANNOUNCED_SECONDS = 2.0


def build_engine(
    recipe: Recipe,
    ds_config: dict[str, Any],
    mesh: Mesh,
    pipeline_bounds: list[int],
    weights: Iterable[tuple[str, torch.Tensor]] | None = None,
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
    weights: Iterable[tuple[str, torch.Tensor]] | None,
) -> Engine:
    compression, loss = config.pop("gradient_compression", None), QueuedLoss(recipe.adapters)
    config.pop("tensor_parallel", None)  # DeepSpeed would start its own
    config.pop(EXCHANGE, None)
    config.pop("planned", None)
    if config.pop("sequence_parallel_size", 1) > 1:
        config["train_batch_size"] *= mesh.sequence  # DeepSpeed counts every rank's micro-batch as other rows
    groups = Groups(mesh, holders=recipe.optimizer.is_muon)
    build = _builder(recipe, config, groups)
    model: Llama | PipelinedLlama
    if bounds:
        model = PipelinedLlama(recipe, bounds, build, mesh, loss)
        # with equal activations on all tensor-parallel ranks each sends a part; here they differ if rows are split
        equal = dict.fromkeys(("pipe_partitioned", "grad_partitioned"), not mesh.split_rows)
        config["pipeline"] = {"use_reentrant": False, **equal}
    else:
        model = Llama(recipe.model, recipe.training.seed, build)
        model.activation_checkpointing = recomputed_blocks(recipe)
    if mesh.sequence > 1:
        share_rows(model, groups.sequence, mesh)
    if attends_by_products(recipe, config, get_accelerator().device_name()):
        use_products(model)
    if weights is not None:
        load_weights(model, weights, recipe, mesh)
    if recipe.training.compile:
        compile_blocks(model)
    optimizer = build_optimizer(model, recipe.optimizer, config)
    matrices = names_of_matrices(model, optimizer)
    if isinstance(optimizer, Lion | Muon | SeparateAdamW):
        config["zero_allow_untested_optimizer"] = True  # DeepSpeed has not tested these; tests/engine has
    if isinstance(optimizer, Guarded):
        optimizer.groups = groups if mesh.tensor > 1 else None
    if isinstance(optimizer, Guarded | SeparateAdamW):
        config["gradient_clipping"] = 0.0  # these optimizers clip by themselves, after measuring
    with contextlib.redirect_stdout(io.StringIO()):  # the bf16 optimizer prints its memory, whatever the log level
        mpu = groups if mesh.tensor > 1 and not bounds else None  # a pipeline brings its own
        wrapped, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, mpu=mpu, dist_init_required=False
        )
    reduction = compressed_reduction(wrapped, compression)
    engine = (
        PipelineEngine(wrapped, mesh, recipe.model, reduction, loss, bounds)
        if bounds
        else Engine(wrapped, mesh, recipe.model, reduction)
    )
    if mesh.sequence > 1:
        engine.head_loss.whole_rows = losses_of_whole_rows(groups.sequence)
    if recipe.objective.name == "contrastive":
        everyone = torch.distributed.group.WORLD
        assert everyone is not None
        of_all = partial(gather_uneven, group=everyone)
        engine.head_loss.contrast = Contrast(recipe.objective.temperature or TEMPERATURE, of_all)
    if recipe.adapters.prior_lr is not None:
        engine.prior = LearnedPrior(engine.head_loss.prior.logits, recipe)
    if isinstance(optimizer, Muon):
        place_matrices(engine, optimizer, matrices, recipe, groups)
    if isinstance(optimizer, SeparateAdamW):
        place_groups(engine, optimizer, recipe)
    return engine


def _builder(recipe: Recipe, config: dict[str, Any], groups: Groups) -> Builder:
    """Makes layers as far as this rank holds them: divided by tensor parallelism, then partitioned by ZeRO-3.

    No more than one whole layer is in memory at a time.
    """
    halves, mesh = {"bf16": torch.bfloat16, "fp16": torch.float16}, groups.mesh
    dtype = next((dtype for key, dtype in halves.items() if config.get(key, {}).get("enabled")), torch.float32)
    partitioned = config.get("zero_optimization", {}).get("stage", 0) == 3
    options: dict[str, Any] = {"config_dict_or_path": config}
    parts = Parts(groups.tensor, mesh) if mesh.tensor > 1 else None
    if parts:
        options |= {"data_parallel_group": groups.replicas, "mpu": groups}

    def build(entry: Layer, seed: int) -> torch.nn.Module:
        layer = entry.build(seed)
        if parts:
            layer = divide_layer(layer, recipe.model, parts)
        if partitioned and any(True for _ in layer.parameters()):
            done = deepspeed.zero.Init(module=layer.to(dtype), **options)
            # one of each for all layers: what swaps parameters to disks, and the ranks of a host that hold them again
            options["param_swapper"] = done.param_swapper
            options["zero_param_parallel_group"] = done.zero_param_process_group
        return layer

    return build


def load_weights(
    model: torch.nn.Module, weights: Iterable[tuple[str, torch.Tensor]], recipe: Recipe, mesh: Mesh
) -> None:
    """Copy weights into the model, one tensor at a time, partitioned or not. Collective over all ranks.

    A table of learned positions takes the recipe's length (`resize_positions`).
    """
    parameters, dimensions = dict(named_parameters(model)), cut_dimensions(recipe.model)
    first_of_replicas = mesh.data_rank == mesh.sequence_rank == 0
    for name, tensor in weights:
        if name not in parameters:  # on another rank of the pipeline
            continue
        if name == "embed_positions.weight":
            tensor = resize_positions(tensor, recipe.model.max_position_embeddings)
        parameter, part = parameters.pop(name), slice_of(tensor, dimensions[name], mesh.tensor_rank, mesh.tensor)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if parameter.numel() and (not hasattr(parameter, "ds_id") or first_of_replicas):
                parameter.copy_(part)
    missing = sorted(name for name in parameters if adapter_of(name) is None)
    assert not missing, f"there are no weights for {missing}"


def compile_blocks(model: torch.nn.Module, backend: str = "inductor") -> None:
    """`torch.compile` every block in place; parameters keep their names, and all blocks share one compilation."""
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(backend=backend)
