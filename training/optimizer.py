"""Optimizer hyperparameters, and which parameters decay.

Every parameter is in exactly one group: matrices of linear maps decay; embeddings, norms and biases do not. Module
types and names decide, because under ZeRO-3 a partitioned parameter has lost its shape.
"""

from typing import Any

import torch
from torch import nn

from model.adapter_config import adapter_of
from training.sections import OptimizerConfig


class Lion(torch.optim.Optimizer):
    """Evolved sign momentum with decoupled decay (Chen et al. 2023, Symbolic Discovery, algorithm 2).

    Works on any cut of the parameters, since every element is updated by itself.
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], weight_decay: float = 0.0
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody has one
        for group in self.param_groups:
            (beta1, beta2), lr = group["betas"], group["lr"]
            for parameter in (p for p in group["params"] if p.grad is not None):
                state = self.state[parameter]
                if not state:
                    state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(parameter)}
                gradient, average = parameter.grad, state["exp_avg"]
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.add_(average.lerp(gradient, 1 - beta1).sign_(), alpha=-lr)
                average.lerp_(gradient, 1 - beta2)
                state["step"] += 1


def parameter_groups(model: nn.Module, config: OptimizerConfig, in_stages: bool = False) -> list[dict[str, Any]]:
    """The trainable parameters as optimizer groups "decay" and "no_decay", each in the order of `named_parameters`.

    For Muon the matrices of linear maps stand in a third group, "muon", which decays too. `in_stages`: then all others stand
    in "no_decay", so that each part of a pipeline has as many groups, although one alone has the output head (DeepSpeed sums
    a norm for each group over the parts); `engine.matrices` tells Muon of the head's decay. Every adapter has a group of its own
    name, with it under the key "adapter", and decays.

    A parameter that several modules share appears once, and does not decay if one of its modules says so: an embedding
    tied to the output head is treated as an embedding. Groups without parameters are left out.
    """
    without_decay: set[int] = set()
    matrices: set[int] = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not _decays(module_name, module, name):
                without_decay.add(id(parameter))
            elif config.is_muon and isinstance(module, nn.Linear):
                matrices.add(id(parameter))
    groups: dict[str, dict[str, Any]] = {
        "muon": {"name": "muon", "params": [], "weight_decay": config.weight_decay},
        "decay": {"name": "decay", "params": [], "weight_decay": config.weight_decay},
        "no_decay": {"name": "no_decay", "params": [], "weight_decay": 0.0},
    }
    for name, parameter in model.named_parameters():  # each shared parameter once
        if not parameter.requires_grad:
            continue
        kind = "no_decay" if id(parameter) in without_decay else "muon" if id(parameter) in matrices else "decay"
        if adapter := adapter_of(name):
            kind = f"adapter {adapter}"
            groups.setdefault(
                kind, {"name": kind, "adapter": adapter, "params": [], "weight_decay": config.weight_decay}
            )
        groups[kind]["params"].append(parameter)
    if in_stages and config.is_muon:
        groups["no_decay"]["params"] = groups["decay"]["params"] + groups["no_decay"]["params"]
        groups["decay"]["params"] = []
    return [group for group in groups.values() if group["params"]]


def _decays(module_name: str, module: nn.Module, parameter_name: str) -> bool:
    kind = f"{module_name.rpartition('.')[2]} {type(module).__name__}".lower()
    embedding_or_norm = isinstance(module, nn.Embedding) or "embed" in kind or "norm" in kind
    return not embedding_or_norm and not parameter_name.endswith("bias")
