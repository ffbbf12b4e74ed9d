"""The layer plan of `model/llama.py` on DeepSpeed's pipeline engine: consecutive layers on different ranks.

Between stages travel the activations [B, T, D] and the integer positions [B, T], from which every stage derives the
documents of its rows again. The last stage takes the loss in chunks, so no stage ever holds all logits.
"""

import contextlib
import io
import re
from collections import deque
from collections.abc import Iterator

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.utils import partition_balanced
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import ModelConfig
from model.documents import Documents
from model.llama import Block, Embedding, Head, Layer, layer_plan
from model.loss import linear_cross_entropy
from training.config import Recipe


class PipelineLayer(nn.Module):
    """One layer of the plan on (x, position_ids), which it hands on with its own output in the place of x."""

    def __init__(self, entry: Layer, recipe: Recipe):
        super().__init__()
        self.entry = entry
        self.layer = entry.build(recipe.training.seed)
        self.copies = recipe.objective.copies
        self.recompute = recipe.training.activation_checkpointing and entry.cls is Block

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, position_ids = inputs
        if not hasattr(position_ids, "documents"):  # once a stage: the same tensor passes through all its layers
            position_ids.documents = Documents.from_position_ids(position_ids, copies=self.copies)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.layer, x, position_ids.documents, use_reentrant=False), position_ids
        return self.layer(x, position_ids.documents), position_ids


class Loss:
    """What the last stage computes instead of logits: its loss function, inside the forward pass.

    (DeepSpeed's bf16 optimizer clears the gradients of parameters that are used after the forward pass.) The stages see the
    micro-batches in one order, so the targets wait here in a queue.
    """

    def __init__(self) -> None:
        self.start([])

    def start(self, micro_batches: list[dict], z_loss_weight: float = 0.0, weight: float = 1.0) -> None:
        self.targets = deque((batch["targets"], batch.get("target_weights")) for batch in micro_batches)
        self.z_loss_weight, self.weight = z_loss_weight, weight
        self.sums = torch.zeros(2, dtype=torch.float64)
        """[objective, cross-entropy] over the micro-batches so far."""

    def __call__(self, layer: PipelineLayer, inputs: tuple[Tensor, Tensor]) -> Tensor:
        x, (targets, weights) = inputs[0], self.targets.popleft()
        weights = None if weights is None else weights.to(x.device)
        problem = x, layer.layer.weight, targets.to(x.device), self.z_loss_weight
        objective, loss = linear_cross_entropy(*problem, target_weights=weights)
        self.sums = self.sums.to(x.device) + torch.stack([objective.detach(), loss.detach()]).double()
        return objective * self.weight


class PipelineHead(PipelineLayer):
    def __init__(self, entry: Layer, recipe: Recipe, loss: Loss):
        super().__init__(entry, recipe)
        self.loss = loss

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        return self.loss(self, inputs)


class PipelinedLlama(PipelineModule):
    """This rank's stage of the model, cut at `bounds` (see `stage_bounds`). The last stage returns the loss."""

    def __init__(self, recipe: Recipe, bounds: list[int]):
        self.bounds, self.loss = bounds, Loss()
        # DeepSpeed prints the seeds that it is not asked to set, and broadcasts tied weights
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            super().__init__(_specs(recipe, self.loss), num_stages=len(bounds) - 1)

    def _partition_layers(self, method: str) -> None:
        self.parts = self.bounds
        self._set_bounds(*self.bounds[self.stage_id : self.stage_id + 2])


def _specs(recipe: Recipe, loss: Loss) -> list[LayerSpec]:
    plan, tied = layer_plan(recipe.model), recipe.model.tie_word_embeddings
    specs = []
    for entry in plan:
        if tied and entry.cls is Embedding:
            spec = TiedLayerSpec(entry.name, PipelineLayer, entry, recipe, tied_weight_attr=["layer.weight"])
        elif tied and entry.cls is Head:
            (source,) = (other for other in plan if other.name == entry.tied_to)
            arguments = {"forward_fn": loss, "tied_weight_attr": ["layer.weight"]}
            spec = TiedLayerSpec(source.name, PipelineLayer, source, recipe, **arguments)
        elif entry.cls is Head:
            spec = LayerSpec(PipelineHead, entry, recipe, loss)
        else:
            spec = LayerSpec(PipelineLayer, entry, recipe)
        specs.append(spec)
    return specs


def stage_bounds(config: ModelConfig, stages: int, partition: str, seq_length: int, copies: int = 1) -> list[int]:
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


def expect(engine: PipelineEngine, shape: tuple[int, int]) -> None:
    """Prepare for micro-batches of [B, T]: the stages exchange their shapes anew when these are not those of the last step."""
    if getattr(engine, "row_shape", shape) != shape:
        engine.reset_activation_shape()
    engine.row_shape, engine.micro_batch_size = shape, shape[0]


def train_batch(engine: PipelineEngine, micro_batches: list[dict], z_loss_weight: float, weight: float) -> torch.Tensor:
    """Forward, backward and update of a step. Returns the sums [objective, cross-entropy] on the last stage, else zeros."""
    engine.module.loss.start(micro_batches, z_loss_weight, weight)
    engine.train_batch(_items(micro_batches))
    return engine.module.loss.sums


def evaluate(engine: PipelineEngine, batches: list[dict]) -> torch.Tensor:
    """The sums over batches of one shape, as `train_batch` returns them, without gradients."""
    engine.module.loss.start(batches)
    engine.reset_activation_shape()  # rows may have another length here than in training
    engine.eval_batch(_items(batches), reduce_output=None, bcast_loss=False, num_micro_batches=len(batches))
    engine.reset_activation_shape()
    return engine.module.loss.sums


def _items(batches: list[dict]) -> Iterator[tuple]:
    """What the engine pulls on its first and last stage: inputs, and labels, which are none here (see `Loss`)."""
    return (((batch["input_ids"], batch["position_ids"]), ()) for batch in batches)
