"""The layer plan of `model/llama.py` on DeepSpeed's pipeline engine: consecutive layers on different ranks.

Between stages travel the activations [B, T, D] and the integer positions [B, T], from which every stage derives the
documents of its rows again. The last stage takes the loss in chunks, so no stage ever holds all logits.
"""

import contextlib
import io
import re
import weakref
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology, PipeModelDataParallelTopology
from deepspeed.runtime.utils import partition_balanced
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.layout.deal import columns_here
from engine.layout.mesh import Mesh
from engine.layout.tensor import cross_entropy_of
from model.adapter_config import AdaptersConfig
from model.config import ModelConfig
from model.documents import Documents
from model.head_loss import HeadLoss
from model.llama import Block, Embedding, Head, Layer, is_recomputed, layer_plan
from training.batch import Batch
from training.config import Recipe

Builder = Callable[[Layer, int], nn.Module]
"""Makes a layer of the plan from a seed, as far as it is here."""


def recomputed_blocks(recipe: Recipe) -> bool | int:
    """What `training.activation_checkpointing` says, for which planner.recompute has put a number in the place of `auto`."""
    chosen = recipe.training.activation_checkpointing
    assert not isinstance(chosen, str), "decided before anything is built"
    return chosen


class KnownDocuments:
    """The documents of the rows that pass through this rank: one tensor of positions goes through all its layers.

    The micro-batches come in one order, so what their rows have waits here in a queue.
    """

    def __init__(self, recipe: Recipe, mesh: Mesh) -> None:
        self._copies, self._visibility, self._mesh = recipe.objective.copies, recipe.model.visibility, mesh
        self._members = recipe.adapters.members
        self._last: tuple[weakref.ref[Tensor], Documents] | None = None
        self.start([])

    def start(self, micro_batches: list[Batch]) -> None:
        """Before the forward passes over these."""
        self._rows = deque((batch.get("adapters"), batch.get("sources"), batch.get("seeds")) for batch in micro_batches)

    def of(self, position_ids: Tensor) -> Documents:
        """Derived from positions [B, T] of whole rows, once for each tensor."""
        if self._last is None or self._last[0]() is not position_ids:
            whole = Documents.from_position_ids(position_ids, copies=self._copies)
            documents = whole.part(columns_here(whole, self._visibility, self._mesh))
            adapters, sources, seeds = self._rows.popleft()
            documents.route(adapters, self._members, sources, seeds)
            self._last = weakref.ref(position_ids), documents
        return self._last[1]


class PipelineLayer(nn.Module):
    """One layer of the plan on (x, position_ids), which it hands on with its own output in the place of x."""

    def __init__(self, entry: Layer, recipe: Recipe, build: Builder, known: KnownDocuments) -> None:
        super().__init__()
        self.entry, self.known = entry, known
        self.layer = build(entry, recipe.training.seed)
        chosen, block = recomputed_blocks(recipe), entry.name.rpartition(".")[2]
        self.recompute = entry.cls is Block and is_recomputed(int(block), recipe.model, chosen)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | Tensor:
        x, position_ids = inputs
        documents = self.known.of(position_ids)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.layer, x, documents, use_reentrant=False), position_ids
        return self.layer(x, documents), position_ids


class QueuedLoss:
    """What the last stage computes instead of logits: its loss function, inside the forward pass.

    (DeepSpeed's bf16 optimizer clears the gradients of parameters that are used after the forward pass.) The stages see the
    micro-batches in one order, so the targets wait here in a queue.
    """

    def __init__(self, adapters: AdaptersConfig) -> None:
        self.of_head = HeadLoss(adapters)
        self.start([])

    def start(self, micro_batches: list[Batch], z_loss_weight: float = 0.0, weight: float = 1.0) -> None:
        """Before the forward passes over these: forget what was, sum anew."""
        self.targets = deque((batch["targets"], batch.get("target_weights")) for batch in micro_batches)
        self.z_loss_weight, self.weight = z_loss_weight, weight
        self.found: list[Tensor] = []
        """Of each micro-batch so far [objective, *sums of `HeadLoss`]."""

    def __call__(self, layer: PipelineLayer, inputs: tuple[Tensor, Tensor]) -> Tensor:
        x, (targets, weights) = inputs[0], self.targets.popleft()
        weights = None if weights is None else weights.to(x.device)
        documents = layer.known.of(inputs[1])
        entropy = cross_entropy_of(layer.layer)
        objective, sums = self.of_head(entropy, x, documents, targets.to(x.device), self.z_loss_weight, weights)
        self.found.append(torch.cat([objective.detach()[None], sums]))
        return objective * self.weight


class PipelineHead(PipelineLayer):
    def __init__(self, entry: Layer, recipe: Recipe, build: Builder, known: KnownDocuments, loss: QueuedLoss) -> None:
        super().__init__(entry, recipe, build, known)
        self.loss = loss

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        return self.loss(self, inputs)


class PipelinedLlama(PipelineModule):
    """This rank's layers of the model, divided at `bounds` (see `pipeline_bounds`). The last rank returns the loss."""

    def __init__(self, recipe: Recipe, bounds: list[int], build: Builder, mesh: Mesh, loss: QueuedLoss) -> None:
        self.bounds, self.config = bounds, recipe.model
        replicas = mesh.data * mesh.sequence  # its grid has no further axis
        topology: PipeDataParallelTopology | PipeModelDataParallelTopology
        if mesh.tensor > 1:
            topology = PipeModelDataParallelTopology(mesh.pipeline, mesh.tensor, replicas)
        else:
            topology = PipeDataParallelTopology(mesh.pipeline, replicas)
        self.known = known = KnownDocuments(recipe, mesh)
        # DeepSpeed prints the seeds that it is not asked to set, and broadcasts tied weights
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            super().__init__(_specs(recipe, build, known, loss), topology=topology)
        if recipe.adapters.freeze_base:
            self.tied_comms: dict[str, Any] = {}  # no gradients to sum

    def _partition_layers(self, method: str) -> None:
        self.parts = self.bounds
        self._set_bounds(*self.bounds[self.stage_id : self.stage_id + 2])


def _specs(recipe: Recipe, build: Builder, known: KnownDocuments, loss: QueuedLoss) -> list[LayerSpec]:
    plan, tied, specs = layer_plan(recipe.model), recipe.model.tie_word_embeddings, []
    common = recipe, build, known
    for entry in plan:
        if tied and entry.cls is Embedding:
            spec = TiedLayerSpec(entry.name, PipelineLayer, entry, *common, tied_weight_attr=["layer.weight"])
        elif tied and entry.cls is Head:
            (source,) = (other for other in plan if other.name == entry.tied_to)
            arguments = {"forward_fn": loss, "tied_weight_attr": ["layer.weight"]}
            spec = TiedLayerSpec(source.name, PipelineLayer, source, *common, **arguments)
        elif entry.cls is Head:
            spec = LayerSpec(PipelineHead, entry, *common, loss)
        else:
            spec = LayerSpec(PipelineLayer, entry, *common)
        specs.append(spec)
    return specs


def untrained_stages(config: ModelConfig, bounds: list[int]) -> list[int]:
    """Numbers of the pipeline's ranks that would hold nothing to train, where only adapters are trained."""
    plan = layer_plan(config)
    if not config.adapters.freeze_base:
        return []
    return [
        number
        for number, (first, last) in enumerate(pairwise(bounds))
        if not any(entry.adapters for entry in plan[first:last])
    ]


def pipeline_bounds(config: ModelConfig, stages: int, partition: str, seq_length: int, copies: int = 1) -> list[int]:
    """Where to cut the plan: stage i holds layers bounds[i] .. bounds[i + 1] - 1, at least one block among them.

    `partition`: "flops" balances arithmetic, the output head's included (it costs as much as several blocks when the
    vocabulary is large; `copies` of a token pass through the blocks, one through the head); "parameters" balances memory;
    "uniform" the number of layers; "type:REGEX" the number of layers whose class matches. Raises ValueError when there are
    fewer blocks than stages or the expression matches nothing.
    """
    plan = layer_plan(config)
    if stages > config.num_hidden_layers:
        raise ValueError(
            f"{stages} pipeline stages for {config.num_hidden_layers} blocks: use at most {config.num_hidden_layers} stages"
        )
    head = config.vocab_size * config.hidden_size
    if partition == "flops":
        block = (config.flops_per_token(seq_length, copies) - 6.0 * head) / config.num_hidden_layers
        costs = [{Block: block, Head: 6.0 * head}.get(entry.cls, 0.0) for entry in plan]
    elif partition == "parameters":
        with torch.device("meta"):
            costs = [sum(p.numel() for p in entry.build(0).parameters()) for entry in plan]
        costs[-1] = head  # a tied head is a copy on the last stage
    elif partition == "uniform":
        costs = [1] * len(plan)
    else:
        expression = partition.removeprefix("type:")
        costs = [int(re.search(expression, entry.cls.__name__, re.IGNORECASE) is not None) for entry in plan]
        if not any(costs):
            names = ", ".join(dict.fromkeys(entry.cls.__name__ for entry in plan))
            raise ValueError(f"pipeline.partition {partition!r} matches none of the layer classes {names}")
    # The optimizer needs as many parameter groups on every stage (blocks have both), so only blocks are dealt out.
    first = next(i for i, entry in enumerate(plan) if entry.cls is Block)
    last = first + config.num_hidden_layers
    units = costs[first:last]
    units[0] += sum(costs[:first])
    units[-1] += sum(costs[last:])
    return [0, *(first + int(bound) for bound in partition_balanced(units, stages)[1:-1]), len(plan)]
