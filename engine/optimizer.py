"""The optimizer object that a DeepSpeed engine is given: the recipe's, in the form its JSON needs."""

import math
from collections.abc import Callable
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.utils import is_model_parallel_parameter

from engine.layout.groups import Groups
from engine.layout.pipeline import PipelinedLlama
from training.muon import Muon
from training.optimizer import Lion, parameter_groups
from training.sections import OptimizerConfig
from training.separate_adamw import SeparateAdamW


class Guarded(torch.optim.Optimizer):
    """An optimizer that measures, guards and clips its own gradients, for ZeRO-0 in float32 or autocast.

    There DeepSpeed (0.19) neither reports a gradient norm nor skips a step whose gradients are not finite. The two
    attributes carry the names under which its engine looks for them after `step`.
    """

    def __init__(self, groups: list[dict[str, Any]], max_grad_norm: float, **options: Any) -> None:
        super().__init__(groups, **options)
        self.max_grad_norm = max_grad_norm
        self.groups: Groups | None = None
        """Of the mesh, where ranks hold parts of the parameters."""
        self.refuses: Callable[[float], bool] = lambda norm: False
        """Asked before every update, with the norm of the whole gradient."""
        self.overflow = False
        self._global_grad_norm: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody has one
        """Update unless the norm of all gradients is not finite or refused; all ranks find the same norm and agree."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        gradients = _gradients(parameters)
        self._global_grad_norm = _total_norm(parameters, self.groups)
        norm = float(self._global_grad_norm)
        self.overflow = not math.isfinite(norm) or self.refuses(norm)
        if self.overflow:
            return
        if self.max_grad_norm > 0:
            scale = (self.max_grad_norm / (self._global_grad_norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, scale)
        super().step(closure)


class GuardedAdamW(Guarded, torch.optim.AdamW):
    pass


class GuardedLion(Guarded, Lion):
    pass


class GuardedMuon(Guarded, Muon):
    pass


class GuardedSeparateAdamW(Guarded, SeparateAdamW):
    pass


def _gradients(parameters: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """In float64, as DeepSpeed measures: on a CPU torch sums a long float32 vector with an error of 4e-4 at 8M elements."""
    return torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients]).norm().float()


def _total_norm(parameters: list[torch.nn.Parameter], groups: Groups | None) -> torch.Tensor:
    """The norm of the whole model's gradient: what ranks hold in parts adds up, what all of them hold counts once."""
    if groups is None:
        return _norm(_gradients(parameters))
    first = groups.mesh.tensor_rank == 0
    square = _norm(_gradients([p for p in parameters if first or is_model_parallel_parameter(p)])).square()
    dist.all_reduce(square, group=groups.tensor)
    return square.sqrt()


def build_optimizer(model: torch.nn.Module, config: OptimizerConfig, ds_config: dict) -> torch.optim.Optimizer:
    """The recipe's optimizer over its decay and no-decay groups.

    DeepSpeedCPUAdam where the states of AdamW are offloaded and the JSON wants it, `SeparateAdamW` where there are adapters, a
    guarded optimizer where DeepSpeed does not guard (ZeRO-0 without bf16/fp16), else torch's fused AdamW or Lion, which need
    no compiler at start-up.
    """
    zero = ds_config.get("zero_optimization", {})
    unguarded = zero.get("stage", 0) == 0 and not any(ds_config.get(key, {}).get("enabled") for key in ("bf16", "fp16"))
    groups = parameter_groups(model, config, in_stages=isinstance(model, PipelinedLlama))
    options = dict[str, Any](lr=config.lr, betas=tuple(config.betas))
    if config.name == "lion":
        return GuardedLion(groups, config.max_grad_norm or 0.0, **options) if unguarded else Lion(groups, **options)
    options["eps"] = config.eps
    if any("adapter" in group for group in groups):
        options |= {"max_norm": config.max_grad_norm or 0.0}
        return GuardedSeparateAdamW(groups, 0.0, **options) if unguarded else SeparateAdamW(groups, **options)
    if config.is_muon:
        options |= {"momentum": config.momentum, "normalize": config.name == "normuon"}
        return GuardedMuon(groups, config.max_grad_norm or 0.0, **options) if unguarded else Muon(groups, **options)
    if zero.get("offload_optimizer") and ds_config["zero_force_ds_cpu_optimizer"]:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        if torch.distributed.get_rank() == 0:
            print("building DeepSpeedCPUAdam for this machine (once, a minute or two) ...", flush=True)
        return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    if unguarded:
        return GuardedAdamW(groups, config.max_grad_norm or 0.0, fused=True, **options)
    return torch.optim.AdamW(groups, fused=True, **options)


def drop_sums(optimizer: Any) -> None:
    """Forget the gradients of a skipped step, to which the next backward pass would add its own.

    DeepSpeed (0.19) does it itself except at ZeRO-1 and 2 with an offloaded optimizer: there `step` leaves its
    `averaged_gradients`, sums over micro-batches in float32, as they are unless the step is applied.
    """
    for group in getattr(optimizer, "averaged_gradients", {}):
        optimizer.averaged_gradients[group] = None
