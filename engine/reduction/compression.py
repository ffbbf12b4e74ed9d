"""Compressed data-parallel reduction at ZeRO stage 0, in place of the families that DeepSpeed 0.19 removed.

DeepSpeed averages the whole gradients once a step, at the accumulation boundary, before the optimizer measures, guards and
clips them. Exactly this average is replaced: each rank adds the residual of the step before to its gradient, the sum is
reduced by one of the `compressors`, and what was not sent is the next residual. So nothing is lost, only late: the sum of
all updates and of the mean residual is the sum of the true mean gradients.

Residuals cost one more copy of the weights in float32 on every rank, and as much in every rank's checkpoint file. What is
not compressed, and PowerSGD's factors, are averaged by DeepSpeed's own method, which rounds them where the JSON has a
`communication_data_type`; only that rounding is lost.
"""

from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, model_validator

from engine import internals
from engine.reduction.compressors import OneBit, PowerSGD, all_finite, merged
from engine.reduction.wire import WireBytes
from engine.safe_load import load_file

FILES = "gradient_compression_rank_{}.pt"


class GradientCompression(BaseModel):
    """The section `gradient_compression` of the JSON."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    method: Literal["powersgd", "onebit"]
    rank: PositiveInt | None = None
    """Of the approximation by PowerSGD; 4 if not given."""
    warmup_steps: NonNegativeInt = 100
    """Optimizer steps at the beginning of the run whose gradients are reduced as DeepSpeed does it."""
    min_elements: PositiveInt = 4096
    """Smaller tensors, and vectors of any size, are not compressed."""

    @model_validator(mode="after")
    def _rank_belongs_to_powersgd(self) -> Self:
        if self.method == "onebit" and self.rank is not None:
            raise ValueError("rank has an effect with method powersgd only: remove it")
        if self.method == "powersgd" and self.rank is None:
            self.rank = 4
        return self


def compressed_reduction(engine: DeepSpeedEngine, section: dict | None) -> "CompressedReduction | None":
    """The engine's reduction from now on, or None where the JSON has no section `gradient_compression`."""
    return None if section is None else CompressedReduction(engine, GradientCompression(**section))


class CompressedReduction:
    """Stands in for the method of a DeepSpeed engine that averages its gradients at stage 0."""

    def __init__(self, engine: DeepSpeedEngine, config: GradientCompression) -> None:
        self._engine = engine
        self._parameters = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
        self._warmup_steps = config.warmup_steps
        self._layout = config.model_dump() | {"world_size": dist.get_world_size()}
        self._compressor = PowerSGD(config.rank) if config.rank else OneBit()
        self._compressed = {
            name
            for name, p in self._parameters.items()
            if p.dim() > 1 and p.numel() >= config.min_elements and self._compressor.saves(p.shape)
        }
        self.residuals: dict[str, torch.Tensor] = {}
        """By name, in the parameter's shape: what this rank still owes."""
        self._kept: tuple[dict[str, torch.Tensor], Any] | None = None
        """Copies of the residuals and of the compressor's state before the step, where it may be refused."""
        self.wire_bytes = 0
        """Bytes that this rank handed to the last reduction's calls (see `engine.reduction.wire`)."""
        self._average = internals.replace_average(engine, self.reduce)

    @torch.no_grad()
    def reduce(self, grads: None = None, elements_per_buffer: int = 500_000_000) -> None:
        """Replace every gradient by its mean over ranks, the same to the bit on all of them.

        Where a gradient or the result is not finite, all gradients become NaN on all ranks, so that the optimizer skips the
        step; residuals and compressor stay as they were.
        """
        gradients = {}
        for name, parameter in self._parameters.items():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients[name] = parameter.grad
            if name in self.residuals:
                parameter.grad += self.residuals[name]
        with WireBytes() as wire:
            if self._compressed and dist.get_world_size() > 1 and self._engine.global_steps >= self._warmup_steps:
                sound = self._reduce_compressed(gradients)
            else:
                self._average(elements_per_buffer=elements_per_buffer)
                sound = not self.residuals or all_finite(list(gradients.values()))
                self.residuals = {} if sound else self.residuals
        self.wire_bytes = wire.total
        if not sound:
            for gradient in gradients.values():
                gradient.fill_(torch.nan)

    def _reduce_compressed(self, gradients: dict[str, torch.Tensor]) -> bool:
        vectors = {name: gradient for name, gradient in gradients.items() if name in self._compressed}
        plain = [gradient for name, gradient in gradients.items() if name not in self._compressed]
        reduced = self._compressor.reduce(vectors, plain, self._average)
        if reduced is None:
            return False
        before, self.residuals = self.residuals, {}
        for name, sent, mean in reduced:
            gradient = gradients[name]
            self.residuals[name] = torch.sub(gradient, sent.view_as(gradient), out=before.get(name))
            gradient.copy_(mean.view_as(gradient))
        return True

    def keep(self, copy: bool) -> None:
        """Before a step: whether `go_back` may be called after its reduction, for which a copy of the residuals is needed."""
        self._kept = None
        if copy:
            device = next(iter(self._parameters.values())).device
            self._kept = _onto(self.residuals, device), _onto(self._compressor.state(), device)

    def go_back(self) -> None:
        """To what was before the step."""
        assert self._kept is not None
        self.residuals = self._kept[0]
        self._compressor.load(self._kept[1], True)

    def file(self) -> tuple[str, dict[str, Any]]:
        """Of a checkpoint, what this rank adds: the name, and the content as of now."""
        state = {"layout": self._layout, "residuals": self.residuals, "compressor": self._compressor.state()}
        return FILES.format(f"{dist.get_rank():05d}"), state

    def restore(self, folder: Path) -> None:
        """Continue with the state of a checkpoint: exactly in the same layout, and with the same total in any other.

        On another number of ranks, or with other settings, every rank takes the mean of all residuals (and what the ranks
        held back) as its own: the mean over the new ranks is the mean over the old. A tensor that is no longer compressed,
        or all on one rank, gets it with its next gradient. A checkpoint without such files starts from nothing.
        """
        files = sorted(folder.glob(FILES.format("*")))
        if not files:
            return
        device = next(iter(self._parameters.values())).device
        states = [load_file(file) for file in files]
        same = states[0]["layout"] == self._layout
        state = states[dist.get_rank()] if same else states[0] | {"residuals": merged(states)}
        self.residuals = {name: residual.clone().to(device) for name, residual in state["residuals"].items()}
        self._compressor.load(_onto(state["compressor"], device), same)


def _onto(tree: Any, device: torch.device) -> Any:
    """Copies of the tensors of a nested dictionary."""
    if isinstance(tree, dict):
        return {key: _onto(value, device) for key, value in tree.items()}
    return tree if tree is None else tree.clone().to(device)
