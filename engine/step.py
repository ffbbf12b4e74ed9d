"""One optimizer step on a DeepSpeed engine of any layout.

The loss is a sum over valid targets divided by the number of targets of the whole step, counted over all ranks and
micro-batches before the first backward pass. So it depends neither on how a step is cut nor on where padding falls.
"""

import contextlib
import io
import math
import sys
import threading
from typing import NamedTuple

import deepspeed
import numpy as np
import torch
from deepspeed import comm as dist
from deepspeed.utils import groups
from torch.distributed import distributed_c10d as c10d

from engine.layout import pipeline
from engine.layout.mesh import Mesh
from engine.layout.sequence import share_rows
from engine.layout.tensor import cut_vocabulary, for_autotp, sum_gradients_once
from engine.optimizer import build_optimizer, drop_sums
from engine.reduction.compression import compress_gradients
from engine.run.initial_weights import load_initial_weights
from engine.run.plan import RunPlan
from launch.signals import REASONS, StopSignal
from model.llama import Block, Llama
from training.balance import imbalance
from training.optimizer import Lion

ANNOUNCED_SECONDS = 2.0


class StepResult(NamedTuple):
    loss: float
    """Cross-entropy per target in nats, over all ranks."""
    objective: float
    """What was minimised: the loss plus the weighted z-loss."""
    targets: int
    grad_norm: float
    """Norm of the whole gradient before clipping; not finite when the step was skipped for it."""
    applied: bool
    """False when the loss or the gradient was not finite: the weights are untouched."""
    attention_imbalance: float
    """How many more (query, key) pairs the busiest rank attended over than the average one, as a share."""
    wire_bytes: int | None
    """What this rank handed to the calls of a compressed reduction; None where DeepSpeed reduces."""


def build_engine(plan: RunPlan, fresh: bool = True) -> deepspeed.DeepSpeedEngine:
    """The model in the layout of the plan's JSON, with the same initial weights in every layout.

    Not `fresh`: a checkpoint is about to replace the weights, so `training.initial_weights` are not read. The first rank
    says so when it takes long.
    """
    late = threading.Timer(ANNOUNCED_SECONDS, print, ("building the model ...",), {"file": sys.stdout, "flush": True})
    late.daemon = True
    if plan.mesh.rank == 0:
        late.start()
    try:
        return _build_engine(plan, fresh)
    finally:
        late.cancel()


def _build_engine(plan: RunPlan, fresh: bool) -> deepspeed.DeepSpeedEngine:
    recipe, config = plan.recipe, dict(plan.ds_config)
    compression = config.pop("gradient_compression", None)
    if plan.stage_bounds:
        model = pipeline.PipelinedLlama(recipe, plan.stage_bounds)
        config["pipeline"] = {"use_reentrant": False}
    else:
        if plan.mesh.tensor > 1:
            config = for_autotp(config, recipe.model)
        stage = config.get("zero_optimization", {}).get("stage", 0)
        with deepspeed.zero.Init(config_dict_or_path=config, enabled=stage == 3):
            model = Llama(recipe.model, seed=recipe.training.seed)
        model.activation_checkpointing = recipe.training.activation_checkpointing
    if config.pop("sequence_parallel_size", 1) > 1:
        share_rows(model, plan.mesh)
        config["train_batch_size"] *= plan.mesh.sequence  # DeepSpeed counts every rank's micro-batch as other rows
    if fresh and recipe.training.initial_weights:
        load_initial_weights(model, recipe)
    if plan.mesh.tensor > 1:
        cut_vocabulary(model, plan.mesh)
    if recipe.training.compile:
        compile_blocks(model)
    optimizer = build_optimizer(model, recipe.optimizer, config)
    if isinstance(optimizer, Lion):
        config["zero_allow_untested_optimizer"] = True  # DeepSpeed has not tested this one; tests/engine has
    if hasattr(optimizer, "max_grad_norm"):
        config["gradient_clipping"] = 0.0  # this optimizer clips by itself, after measuring
    with contextlib.redirect_stdout(io.StringIO()):  # the bf16 optimizer prints its memory, whatever the log level
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    engine.mesh, engine.visibility = plan.mesh, recipe.model.visibility
    if plan.mesh.tensor > 1 and not config["tensor_parallel"].get("tp_overlap_comm"):
        sum_gradients_once(model)
    compress_gradients(engine, compression)
    return engine


def compile_blocks(model: torch.nn.Module, backend: str = "inductor") -> None:
    """`torch.compile` every block in place; parameters keep their names, and all blocks share one compilation."""
    for module in model.modules():
        if isinstance(module, Block):
            module.compile(backend=backend)


def close_engine(engine: deepspeed.DeepSpeedEngine) -> None:
    """Let go of an engine, of its process groups and of what DeepSpeed remembers, so that the process may build another.

    All ranks call it. An idle gloo group costs two threads that wake a hundred times a second.
    """
    engine.destroy()
    groups._release_process_group_references()
    dist.barrier()  # a rank that still receives would lose its peer
    for group in set(c10d._world.pg_map) - {c10d.GroupMember.WORLD}:
        c10d.destroy_process_group(group)


def train_step(
    engine: deepspeed.DeepSpeedEngine, micro_batches: list[dict], learning_rate: float, z_loss_weight: float
) -> StepResult:
    """Forward, backward and update over this rank's micro-batches of one optimizer step.

    `micro_batches`: as training.data makes them; the same number on every rank.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    follow_the_cut(engine, micro_batches)
    mesh: Mesh = engine.mesh
    targets, imbalance = survey(engine, micro_batches)
    # DeepSpeed averages over the ranks that hold other tokens and divides by the accumulation steps; both are undone here.
    weight = mesh.data * mesh.sequence * len(micro_batches) / max(targets, 1)
    if isinstance(engine, pipeline.PipelineEngine):
        sums = pipeline.train_batch(engine, micro_batches, z_loss_weight, weight)
    else:
        sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
        for batch in micro_batches:
            objective_sum, loss_sum = forward(engine, batch, z_loss_weight)
            sums += torch.stack([objective_sum.detach(), loss_sum.detach()]).double()
            engine.backward(objective_sum * weight)
            engine.step()
    objective, loss = (total / max(targets, 1) for total in sum_over_tokens(engine, sums.tolist()))
    norm, applied = engine.get_global_grad_norm(), engine.was_step_applied()
    if not applied:
        drop_sums(engine.optimizer)
    wire_bytes = engine.gradient_compression and engine.gradient_compression.wire_bytes
    return StepResult(loss, objective, targets, float(norm), applied, imbalance, wire_bytes)


def follow_the_cut(engine: deepspeed.DeepSpeedEngine, micro_batches: list[dict]) -> None:
    """Tell DeepSpeed how many micro-batches make this step, and of which size, where a new stage cuts it otherwise."""
    shape = tuple(micro_batches[0]["input_ids"].shape)
    cut = shape[0], len(micro_batches)
    if cut != (engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()):
        engine.set_train_micro_batch_size(shape[0])
        engine.set_train_batch_size(math.prod(cut) * engine.dp_world_size)
        engine.micro_steps = 0  # the boundary of accumulation is counted from here on
    if isinstance(engine, pipeline.PipelineEngine):
        pipeline.expect(engine, shape)


def agree_to_stop(engine: deepspeed.DeepSpeedEngine, stop: StopSignal, out_of_time: bool) -> bool:
    """Whether any rank was asked to stop or is out of time; then all have the same reason, and so the same exit code."""
    own = stop.name or ("time limit" if out_of_time else None)
    counts = sum_over_ranks(engine, [float(own == reason) for reason in REASONS])
    agreed = [reason for reason, count in zip(REASONS, counts, strict=True) if count]
    stop.name = agreed[0] if agreed else stop.name
    return bool(agreed)


def forward(engine, batch: dict, z_loss_weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums (objective, cross-entropy) over this rank's tokens of one micro-batch."""
    mesh: Mesh = engine.mesh
    share = batch["input_ids"].shape[1] // mesh.sequence
    columns = slice(mesh.sequence_rank * share, (mesh.sequence_rank + 1) * share)
    here = {
        key: batch[key][:, columns].to(engine.device, non_blocking=True)
        for key in ("input_ids", "targets", "target_weights")
        if key in batch
    }
    how = {"z_loss_weight": z_loss_weight, "columns": columns, "copies": batch.get("copies", 1)}
    return engine(position_ids=batch["position_ids"], **here, **how)


def survey(engine, batches: list[dict]) -> tuple[int, float]:
    """Valid targets of the batches over all ranks, those of a row once however many ranks work on it; and how unevenly
    their attention is spread over the data-parallel ranks (see `training.balance.imbalance`)."""
    mesh: Mesh = engine.mesh
    ours = [0.0] * (1 + mesh.data)
    ours[0] = sum(batch["num_targets"] for batch in batches) / mesh.sequence
    for batch in batches:  # every row begins with a document
        starts = np.flatnonzero(batch["position_ids"].numpy() == 0)
        lengths = np.diff(starts, append=batch["position_ids"].numel())
        ours[1 + mesh.data_rank] += engine.visibility.pairs(lengths).sum() / mesh.sequence
    targets, *pairs = sum_over_tokens(engine, ours)
    return round(targets), imbalance(np.array(pairs))


def sum_over_ranks(engine, values: list[float]) -> list[float]:
    """Element by element, in float64."""
    total = torch.tensor(values, dtype=torch.float64, device=engine.device)
    dist.all_reduce(total)
    return total.tolist()


def sum_over_tokens(engine, values: list[float]) -> list[float]:
    """Over all ranks, each token counted once where several ranks compute the same."""
    return sum_over_ranks(engine, values if engine.mesh.counts else [0.0] * len(values))
