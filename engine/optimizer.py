"""The optimizer object that a DeepSpeed engine is given: the recipe's AdamW in the form its JSON needs."""

import torch

from training.optimizer import OptimizerConfig, parameter_groups


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that measures, guards and clips its own gradients, for ZeRO-0 in float32 or autocast.

    There DeepSpeed (0.19) neither reports a gradient norm nor skips a step whose gradients are not finite. The two
    attributes carry the names under which its engine looks for them after `step`.
    """

    def __init__(self, groups, max_grad_norm: float, **options):
        super().__init__(groups, **options)
        self.max_grad_norm = max_grad_norm
        self.overflow = False
        self._global_grad_norm: torch.Tensor | None = None

    @torch.no_grad()
    def step(self, closure=None):
        """Update unless the norm of all gradients is not finite; every rank holds the same gradients and agrees."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._global_grad_norm = torch.nn.utils.get_total_norm(gradients)
        self.overflow = not bool(torch.isfinite(self._global_grad_norm))
        if self.overflow:
            return None
        if self.max_grad_norm > 0:
            scale = (self.max_grad_norm / (self._global_grad_norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, scale)
        return super().step(closure)


def build_optimizer(model: torch.nn.Module, config: OptimizerConfig, ds_config: dict) -> torch.optim.Optimizer:
    """AdamW over the recipe's decay and no-decay groups.

    DeepSpeedCPUAdam where optimizer states are offloaded and the JSON wants it, GuardedAdamW where DeepSpeed does not
    guard (ZeRO-0 without bf16/fp16), else torch's fused AdamW, which needs no compiler at start-up.
    """
    zero = ds_config.get("zero_optimization", {})
    options = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}
    groups = parameter_groups(model, config)
    if zero.get("offload_optimizer") and ds_config["zero_force_ds_cpu_optimizer"]:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        if torch.distributed.get_rank() == 0:
            print("building DeepSpeedCPUAdam for this machine (once, a minute or two) ...", flush=True)
        return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    if zero.get("stage", 0) == 0 and not any(ds_config.get(key, {}).get("enabled") for key in ("bf16", "fp16")):
        return GuardedAdamW(groups, config.max_grad_norm or 0.0, fused=True, **options)
    return torch.optim.AdamW(groups, fused=True, **options)
