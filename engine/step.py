"""One optimizer step on a DeepSpeed engine of any ZeRO stage.

The loss is a sum over valid targets divided by the number of targets of the whole step, counted over all ranks and
micro-batches before the first backward pass. So it depends neither on how a step is cut nor on where padding falls.
"""

from typing import NamedTuple

import deepspeed
import torch
from deepspeed import comm as dist

from engine.optimizer import build_optimizer
from engine.topology import Topology
from model.llama import Llama
from training.config import Recipe


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


def build_engine(recipe: Recipe, ds_config: dict, topology: Topology) -> deepspeed.DeepSpeedEngine:
    """The model on its ZeRO stage, with the same initial weights in every layout."""
    stage = ds_config.get("zero_optimization", {}).get("stage", 0)
    with deepspeed.zero.Init(config_dict_or_path=ds_config, enabled=stage == 3):
        model = Llama(recipe.model, seed=recipe.training.seed)
    model.activation_checkpointing = recipe.training.activation_checkpointing
    if recipe.training.initial_weights:
        load_initial_weights(model, recipe.training.initial_weights)
    optimizer = build_optimizer(model, recipe.optimizer, ds_config)
    config = dict(ds_config)
    if hasattr(optimizer, "max_grad_norm"):
        config["gradient_clipping"] = 0.0  # this optimizer clips by itself, after measuring
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine


def load_initial_weights(model: Llama, folder: str) -> None:
    """Copy a Hugging Face folder's weights into the model, one tensor at a time, partitioned or not."""
    from model.hf import load_hf

    _, tensors = load_hf(folder)
    parameters = dict(model.named_parameters())
    for name, tensor in tensors:
        if name not in parameters:
            continue
        parameter = parameters.pop(name)
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            if parameter.numel() and (not hasattr(parameter, "ds_id") or dist.get_rank() == 0):
                parameter.copy_(tensor)
    assert not parameters, f"{folder} has no weights for {sorted(parameters)}"


def train_step(
    engine: deepspeed.DeepSpeedEngine, micro_batches: list[dict], learning_rate: float, z_loss_weight: float
) -> StepResult:
    """Forward, backward and update over this rank's micro-batches of one optimizer step.

    `micro_batches`: `input_ids`, `position_ids`, `targets`, each [B, T], and `num_targets`; the same number of
    micro-batches on every rank.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    targets = sum_over_ranks(engine, [sum(batch["num_targets"] for batch in micro_batches)])[0]
    # DeepSpeed averages over ranks and divides by the accumulation steps; both are undone here.
    weight = dist.get_world_size() * len(micro_batches) / max(targets, 1)
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
    for batch in micro_batches:
        objective_sum, loss_sum = forward(engine, batch, z_loss_weight)
        sums += torch.stack([objective_sum.detach(), loss_sum.detach()]).double()
        engine.backward(objective_sum * weight)
        engine.step()
    objective, loss = (total / max(targets, 1) for total in sum_over_ranks(engine, sums.tolist()))
    norm = engine.get_global_grad_norm()
    return StepResult(loss, objective, int(targets), float(norm), engine.was_step_applied())


def any_rank(engine: deepspeed.DeepSpeedEngine, flag: bool) -> bool:
    """Whether the flag is set anywhere, so that all ranks act on a signal that reached only one."""
    return sum_over_ranks(engine, [float(flag)])[0] > 0


def forward(engine, batch: dict, z_loss_weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums (objective, cross-entropy) over one micro-batch of this rank."""
    inputs, targets = (batch[key].to(engine.device, non_blocking=True) for key in ("input_ids", "targets"))
    return engine(inputs, batch["position_ids"], targets, z_loss_weight=z_loss_weight)


def sum_over_ranks(engine, values: list[float]) -> list[float]:
    """Element by element, in float64."""
    total = torch.tensor(values, dtype=torch.float64, device=engine.device)
    dist.all_reduce(total)
    return total.tolist()
