"""What every layer of the plan is like at some steps, the same in every layout.

Nothing is gathered: a rank takes sums of squares of the elements that it updates (at ZeRO-1 to 3 its shares, in host memory
where they are offloaded) and of the tokens that it works on, and these sums are added over all ranks. The logits are those of
the step's first sample, on the ranks that have it (see `model.logits`).
"""

import math
from collections import defaultdict
from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.engine import Engine
from engine.layout.held import counted_once
from engine.layout.pipeline import PipelineLayer
from engine.layout.sequence import KeyAttention, UlyssesAttention
from engine.step import StepResult
from model.documents import Documents
from model.llama import Attention, Head, Llama, layer_plan
from model.logits import largest_logit
from model.part_attention import RowPart
from model.visibility import Visibility
from training.batch import Batch
from training.config import Recipe
from training.optimizer import parameter_groups
from training.state import TrainState


class Figures(NamedTuple):
    """Of an applied step."""

    layers: dict[str, dict[str, float]]
    """By kind and layer of the plan:

    - `grad_norm`: of the gradient of its trained parameters, before clipping; squared they add up to that of the step.
    - `parameter_rms`, `update_rms`: of these parameters after the update, and of what the update added to them.
    - `activation_rms`: of what the layer hands on, over all tokens of the step.
    - `max_attention_logit`: the largest q . k / sqrt(d) of all heads, for at most 1,024 evenly spread queries of the step's first
      sample and all keys that these see.
    """
    groups: dict[str, float]
    """Norm of the gradient, before clipping, of each group of parameters that the optimizer has (`training.optimizer`)."""


SUMS = ("gradients", "groups", "updates", "parameters", "elements", "activations", "values")
"""Of squares, and how many there are of them."""


class LayerStatistics:
    """Watches an engine at the first of its run's steps and at every so many: `expect`, the step, `read`."""

    def __init__(self, engine: Engine, recipe: Recipe) -> None:
        self._engine, self._every = engine, recipe.logging.layer_statistics_every_steps
        self._layers = [entry.name for entry in layer_plan(engine.config)]
        self._watching, self._pass = False, -1
        if self._every:
            self._group_of = _groups(recipe)
            self._groups = list(dict.fromkeys(self._group_of.values()))
            self._watch_activations()
            engine.base_optimizer.register_step_pre_hook(self._before_update)
            engine.base_optimizer.register_step_post_hook(self._after_update)

    def expect(self, state: TrainState, micro_batches: list[Batch]) -> None:
        """Before the passes of the step that comes after `state`, whose samples have been read."""
        engine, step = self._engine, state.step + 1
        self._watching = bool(self._every) and (step == 1 or step % self._every == 0)
        if not self._watching:
            return
        found = [(batch["samples"] == state.consumed_in_stage).nonzero().flatten() for batch in micro_batches]
        self._rows = [int(places[0]) if len(places) else None for places in found]
        self._size = len(micro_batches[0]["input_ids"])
        self._pass = -1
        self._seen: set[tuple[str, int, int]] = set()
        self._squares: list[tuple[str, int, Tensor]] = []
        self._sums = {kind: np.zeros(len(self._groups if kind == "groups" else self._layers)) for kind in SUMS}
        self._logits: list[tuple[int, Tensor]] = []
        self._earlier: dict[int, Tensor] = {}
        self._shares: dict[int, list[tuple[str, slice]]] = defaultdict(list)
        for share in counted_once(engine.optimizer, engine.module, engine.mesh, engine.config):
            place = slice(share.offset, share.offset + len(share.elements))
            self._shares[id(share.holder)].append((share.name, place))

    def read(self, result: StepResult) -> Figures | None:
        """Of the step that was done; None where none was watched, or it was not applied. Collective over all ranks."""
        if not self._watching:
            return None
        self._watching = False
        if not result.applied:
            return None
        device = self._engine.device
        squares = [square.to(device) for *_, square in self._squares]
        values = torch.stack(squares).tolist() if squares else []  # of a rank whose like counts everything
        for (kind, layer, _), value in zip(self._squares, values, strict=True):
            self._sums[kind][layer] += value
        totals = self._engine.sum_over_ranks(np.concatenate(list(self._sums.values())).tolist())
        ends = np.cumsum([len(of_kind) for of_kind in self._sums.values()])
        sums = dict(zip(SUMS, np.split(np.array(totals), ends[:-1]), strict=True))
        clip = self._engine.deepspeed.gradient_clipping()
        clipped = max(1.0, (result.grad_norm + 1e-6) / clip) if clip else 1.0
        layers = {
            "grad_norm": self._named(np.sqrt(sums["gradients"]) * clipped, sums["elements"]),
            "parameter_rms": self._named(_rms(sums["parameters"], sums["elements"]), sums["elements"]),
            "update_rms": self._named(_rms(sums["updates"], sums["elements"]), sums["elements"]),
            "activation_rms": self._named(_rms(sums["activations"], sums["values"]), sums["values"]),
            "max_attention_logit": self._largest_logits(),
        }
        self._squares, self._logits = [], []
        return Figures(layers, dict(zip(self._groups, (np.sqrt(sums["groups"]) * clipped).tolist(), strict=True)))

    def _named(self, of_layers: np.ndarray, counts: np.ndarray) -> dict[str, float]:
        """Without layers that have nothing of the kind."""
        return {
            name: value for name, value, count in zip(self._layers, of_layers.tolist(), counts, strict=True) if count
        }

    def _largest_logits(self) -> dict[str, float]:
        largest = torch.full((len(self._layers),), -math.inf, device=self._engine.device)
        for layer, logit in self._logits:
            largest[layer] = torch.maximum(largest[layer], logit)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return {name: value for name, value in zip(self._layers, largest.tolist(), strict=True) if value > -math.inf}

    def _layer_of(self, parameter: str) -> int:
        return next(i for i, name in enumerate(self._layers) if parameter.startswith(f"{name}."))

    # Parameters

    def _before_update(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Also called a second time within the step of an optimizer that clips by itself, when its gradients are clipped."""
        for holder in _updated(optimizer) if self._watching else ():
            if id(holder) in self._earlier or holder.grad is None:
                continue
            self._earlier[id(holder)] = holder.detach().clone()
            self._add("gradients", holder, holder.grad)

    def _after_update(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        for holder in _updated(optimizer) if self._watching else ():
            earlier = self._earlier.pop(id(holder), None)
            if earlier is None:
                continue
            self._add("parameters", holder, holder)
            self._add("updates", holder, earlier.sub_(holder.detach()))
            for name, place in self._shares[id(holder)]:
                self._sums["elements"][self._layer_of(name)] += place.stop - place.start

    def _add(self, kind: str, holder: Tensor, values: Tensor) -> None:
        flat = values.detach().reshape(-1)
        for name, place in self._shares[id(holder)]:
            square = _square(flat[place])
            self._squares.append((kind, self._layer_of(name), square))
            if kind == "gradients":
                self._squares.append(("groups", self._groups.index(self._group_of[name]), square))

    # Activations and logits

    def _watch_activations(self) -> None:
        module, mesh = self._engine.module, self._engine.mesh
        stages = {layer.entry.name: layer.layer for layer in module.modules() if isinstance(layer, PipelineLayer)}
        counts = mesh.tensor_rank == 0 or mesh.split_rows  # the others of its group have the same
        module.register_forward_pre_hook(self._next_pass)
        bounds = self._engine.pipeline_bounds or (0, len(self._layers))
        first, last = bounds[mesh.pipeline_rank : mesh.pipeline_rank + 2]
        for number, entry in list(enumerate(layer_plan(self._engine.config)))[first:last]:
            if entry.cls is Head:  # its output is a loss
                continue
            layer = stages[entry.name] if stages else module.get_submodule(entry.name)
            if counts:
                layer.register_forward_hook(self._after_layer(number))
            for attention in layer.modules():
                if isinstance(attention, Attention):
                    inner = attention.attend
                    place: Any = inner if isinstance(inner, UlyssesAttention | KeyAttention) else attention
                    place.attend = _Watched(place.attend, number, self._look)

    def _next_pass(self, module: nn.Module, *_: object) -> None:
        self._pass += module.training  # adapters may be chosen first, by passes without gradients

    def _first_time(self, kind: str, layer: int) -> bool:
        """In this pass: backward does some layers again."""
        key = kind, layer, self._pass
        known = key in self._seen
        self._seen.add(key)
        return not known

    def _after_layer(self, layer: int) -> Callable[..., None]:
        @torch.compiler.disable
        def look(module: nn.Module, _: Any, out: Tensor) -> None:
            if self._watching and module.training and self._first_time("activations", layer):
                self._squares.append(("activations", layer, _square(out.detach())))
                self._sums["values"][layer] += out.numel()

        return look

    def _look(
        self, layer: int, q: Tensor, k: Tensor, documents: Documents, visibility: Visibility, *part: RowPart
    ) -> None:
        if not self._watching or not self._engine.module.training or not self._first_time("logits", layer):
            return
        row = self._rows[self._pass]
        for each in range(row, len(q), self._size) if row is not None else ():  # once for each adapter, perhaps
            self._logits.append((layer, largest_logit(q, k, documents, visibility, each, part[0] if part else None)))


class _Watched:
    """A function that attends, after a look at what it attends to."""

    def __init__(self, attend: Callable[..., Tensor], layer: int, look: Callable[..., None]) -> None:
        self._attend, self._layer, self._look = attend, layer, look

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, visibility: Visibility, *part: RowPart
    ) -> Tensor:
        self._look(self._layer, q, k, documents, visibility, *part)
        return self._attend(q, k, v, documents, visibility, *part)


def _groups(recipe: Recipe) -> dict[str, str]:
    """By name in the layer plan, of all parameters that are trained: the group of the optimizer, as one process has them."""
    with torch.device("meta"):
        model = Llama(recipe.model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, recipe.optimizer)
    return {names[id(parameter)]: group["name"] for group in groups for parameter in group["params"]}


def _updated(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return list(chain.from_iterable(group["params"] for group in optimizer.param_groups))


def _square(values: Tensor) -> Tensor:
    """The sum of squares, in float64: on a CPU torch sums a long float32 vector with an error of 4e-4 at 8M elements."""
    return torch.linalg.vector_norm(values, dtype=torch.float64).square()


def _rms(squares: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.sqrt(squares / np.maximum(counts, 1))
