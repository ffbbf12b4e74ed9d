"""Tensor parallelism: the ranks of a group work on the same tokens, each with its part of every matrix.

DeepSpeed's AutoTP takes the linear maps of the blocks, by `engine.layout.slices.partition_spec`. Embedding and head are cut by
vocabulary here: logits and loss would otherwise be computed as often as there are ranks in a group, which for a small
model or a large vocabulary is most of the arithmetic.
"""

import math
from functools import partial
from typing import Any

import deepspeed
import torch
import torch.nn.functional as F
from deepspeed import comm as dist
from deepspeed.module_inject.layers import LinearLayer, RowParallel
from deepspeed.utils import groups
from torch import Tensor, nn

from engine import internals
from engine.layout.mesh import Mesh
from engine.layout.slices import partition_spec, slice_of
from model.config import ModelConfig
from model.documents import Documents
from model.llama import Attention, FeedForward, Llama
from model.loss import CHUNK_TOKENS, VocabularyPart, linear_cross_entropy


class VocabularyEmbedding(nn.Module):
    """`model.llama.Embedding` with the vectors of some tokens; the others' come from the other ranks."""

    def __init__(self, weight: nn.Parameter, first: int) -> None:
        super().__init__()
        self.weight, self.first, self.tokens = weight, first, len(weight)

    def forward(self, input_ids: Tensor, documents: Documents | None = None) -> Tensor:
        local = input_ids - self.first
        here = (local >= 0) & (local < self.tokens)
        x = F.embedding(local.where(here, 0), self.weight).where(here.unsqueeze(-1), 0)
        return RowParallel.apply(groups.get_tensor_model_parallel_group(), x, False)


class VocabularyHead(nn.Module):
    """`model.llama.Head` with the logits of some tokens. A chunk costs the group one exchange of two numbers a token."""

    def __init__(self, weight: nn.Parameter, first: int, ranks: int) -> None:
        super().__init__()
        self.weight, self.part = weight, VocabularyPart(first, _gather)
        self.chunk_tokens = CHUNK_TOKENS * ranks  # as many logits at a time as with the whole vocabulary

    def forward(
        self,
        x: Tensor,
        documents: Documents,
        targets: Tensor,
        z_loss_weight: float = 0.0,
        target_weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        how = self.chunk_tokens, self.part, target_weights
        return linear_cross_entropy(_SumGradient.apply(x), self.weight, targets, z_loss_weight, *how)


class _SumGradient(torch.autograd.Function):
    """The tensor itself; its gradient is summed over the tensor-parallel group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=groups.get_tensor_model_parallel_group())
        return grad


def _gather(x: Tensor) -> Tensor:
    """[2, C] of each rank of the tensor-parallel group -> [P, 2, C]."""
    group = groups.get_tensor_model_parallel_group()
    parts = x.new_empty(dist.get_world_size(group) * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(parts, x, group=group)
    return parts.unflatten(0, (-1, len(x)))


def for_autotp(ds_config: dict, model: ModelConfig) -> dict:
    """A filled JSON as AutoTP needs it: told how to cut, and without the global batch.

    DeepSpeed would check that number against the ranks of a launch in one place and the data-parallel ranks in another.
    """
    config = ds_config | {"tensor_parallel": ds_config["tensor_parallel"] | {"partition_config": partition_spec(model)}}
    del config["train_batch_size"]
    return config


def divide_vocabulary(model: Llama, mesh: Mesh) -> None:
    """Replace embedding and head by this rank's part of them, before the optimizer sees their parameters.

    What else ZeRO-3 has partitioned over all ranks, and AutoTP will not replace, becomes whole again: ZeRO-3 then partitions
    everything alike, over the ranks that hold the same part.
    """
    tied = model.lm_head.weight is model.embed_tokens.weight
    embedding = _part(model.embed_tokens.weight, mesh)
    head = embedding if tied else _part(model.lm_head.weight, mesh)
    rows = slice_of(torch.arange(model.config.vocab_size), 0, mesh.tensor_rank, mesh.tensor)
    model.embed_tokens = VocabularyEmbedding(embedding, int(rows[0]))  # type: ignore[assignment]  # does the same
    model.lm_head = VocabularyHead(head, int(rows[0]), mesh.tensor)  # type: ignore[assignment]
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if hasattr(parameter, "ds_id") and not isinstance(module, nn.Linear):
                with deepspeed.zero.GatheredParameters([parameter]):
                    whole = nn.Parameter(parameter.data.clone())
                setattr(module, name, whole)


def _part(parameter: nn.Parameter, mesh: Mesh) -> nn.Parameter:
    with deepspeed.zero.GatheredParameters([parameter]):
        part = nn.Parameter(slice_of(parameter.data, 0, mesh.tensor_rank, mesh.tensor).clone())
    internals.mark_as_part(part)
    return part


def sum_gradients_once(model: Llama) -> None:
    """Let maps that read the same activations (q, k, v; gate, up) share the sum of their gradients over the group.

    AutoTP sums for each map: with the two sums of the forward pass 7 a block instead of 4. To be called on its result.
    """
    for module in model.modules():
        if isinstance(module, Attention | FeedForward):
            module.register_forward_pre_hook(lambda _, inputs: (_SumGradient.apply(inputs[0]), *inputs[1:]))
            for linear in module.children():
                if isinstance(linear, LinearLayer):
                    internals.replace_forward(linear, partial(_multiply, linear))


def _multiply(linear: LinearLayer, x: Tensor) -> Tensor:
    return F.linear(x, linear.weight, linear.bias)


def tensor_problems(config: ModelConfig, mesh: Mesh) -> list[str]:
    """Why the matrices of a model cannot be cut over the ranks of a tensor-parallel group."""
    sizes = {
        "attention heads": config.num_attention_heads,
        "key/value heads": config.kv_heads,
        "feed-forward width": config.intermediate_size,
    }
    problems, largest = [], math.gcd(*sizes.values())
    if largest % mesh.tensor:
        whole = ", ".join(f"{size} {name}" for name, size in sizes.items())
        legal = [n for n in range(2, largest + 1) if largest % n == 0]
        problems.append(
            f"tensor_parallel.autotp_size {mesh.tensor} does not divide the model's {whole}: use "
            f"{' or '.join(map(str, legal)) or 'another layout'}"
        )
    return problems
