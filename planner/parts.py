"""Which elements of a model the ranks hold, and how many there are in each part of a step."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

from engine.layout.mesh import Mesh
from engine.layout.pipeline import recomputed_blocks
from engine.run.plan import RunPlan
from model.config import ModelConfig
from model.llama import Block, Embedding, Head, is_recomputed, layer_plan


class StageParts(NamedTuple):
    """What one rank of a pipeline holds of the layers; all of them without a pipeline."""

    blocks: int
    recomputed: int
    """Of the blocks."""
    embedding: bool
    head: bool
    elements: int
    """Parameters of one rank's part, before ZeRO divides them among replicas."""
    trained: int
    """Of them, those that an optimizer has."""
    tensors: int
    """Parameter tensors."""


def stage_parts(plan: RunPlan) -> list[StageParts]:
    """By rank of the pipeline."""
    model, chosen = part_of_model(plan.recipe.model, plan.mesh), recomputed_blocks(plan.recipe)
    layers = layer_plan(model)
    first_of_kind = {(layer.cls, layer.adapters is None): layer for layer in reversed(layers)}
    with torch.device("meta"):
        kinds = {kind: layer.build(0) for kind, layer in first_of_kind.items()}
    counts = {kind: (elements(made), elements(made, True), len([*made.parameters()])) for kind, made in kinds.items()}
    bounds, found = plan.pipeline_bounds or [0, len(layers)], []
    for first, last in pairwise(bounds):
        here = layers[first:last]
        sums = [sum(column) for column in zip(*(counts[each.cls, each.adapters is None] for each in here), strict=True)]
        numbers = [int(each.name.rpartition(".")[2]) for each in here if each.cls is Block]
        ends = [any(each.cls is kind for each in here) for kind in (Embedding, Head)]
        if model.tie_word_embeddings and ends == [False, True]:  # the last rank has a copy of the embedding
            sums = [total + of_table for total, of_table in zip(sums, counts[Embedding, True], strict=True)]
        recomputed = sum(is_recomputed(number, model, chosen) for number in numbers)
        found.append(StageParts(len(numbers), recomputed, ends[0], ends[1], *sums))
    return found


def elements(module: nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def part_of_model(model: ModelConfig, mesh: Mesh) -> ModelConfig:
    """The model whose layers have the shapes of one rank's part, where tensor parallelism divides them."""
    n = mesh.tensor
    if n == 1:
        return model
    sizes = {
        "head_dim": model.head_width,
        "num_attention_heads": model.num_attention_heads // n,
        "num_key_value_heads": model.kv_heads // n,
        "intermediate_size": model.intermediate_size // n,
        "vocab_size": -(-model.vocab_size // n),
    }
    return ModelConfig.model_construct(**{**dict(model), **sizes})
