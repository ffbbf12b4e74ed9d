"""Tensor parallelism: the ranks of a group work on the same tokens, each with its part of every matrix.

What is divided, and along which dimension, says `engine.layout.slices.CUTS`. A region begins where activations enter maps that
are cut by their outputs and ends after the one that is cut by its inputs (Shoeybi et al. 2019, section 3): to enter is the
identity, whose gradient is summed over the group; to leave is the sum, whose gradient is the identity. With `split_rows`
each rank keeps only its part of the tokens between regions (Korthikanti et al. 2022, section 4.2.2): to enter is an
all-gather, to leave a reduce-scatter, at the same cost on the wire, and norms, residuals and what travels through a pipeline
are that much smaller.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from engine import internals
from engine.layout.exchange import Gather, Scatter, Sum, SumGradient, gather, scatter, sum_up
from engine.layout.mesh import Mesh
from engine.layout.slices import cuts_of, first_of_slice, slice_of
from model.adapter_config import FACTORS
from model.adapters import AdaptedLinear
from model.compiled import uncompiled
from model.config import ModelConfig
from model.documents import Documents
from model.head_loss import HeadLoss
from model.llama import Attention, Embedding, FeedForward, Head, RMSNorm
from model.loss import CHUNK_TOKENS, VocabularyPart, linear_cross_entropy
from model.norm import rms_norm
from model.positions import POSITION_LAYERS, LearnedPositionEmbedding
from model.seeded import multiply


class Parts:
    """What the ranks of a tensor-parallel group do with the activations and parameters that they share."""

    def __init__(self, group: dist.ProcessGroup, mesh: Mesh) -> None:
        self.group, self.rank, self.ranks, self.split_rows = group, mesh.tensor_rank, mesh.tensor, mesh.split_rows

    @uncompiled  # collectives stand between the compiled stretches
    def enter(self, x: Tensor) -> Tensor:
        """[B, T, D], of which with `split_rows` [B, T / n, D] is here -> [B, T, D]."""
        return (Gather if self.split_rows else SumGradient).apply(x, self.group)

    @uncompiled
    def leave(self, x: Tensor) -> Tensor:
        """One addend [B, T, D] on each rank -> the sum [B, T, D], with `split_rows` the part [B, T / n, D] of it."""
        return (Scatter if self.split_rows else Sum).apply(x, self.group)

    @uncompiled
    def shared(self, parameter: Tensor) -> Tensor:
        """A whole parameter, of which each rank finds a part of the gradient."""
        return SumGradient.apply(parameter, self.group)

    def stack(self, x: Tensor) -> Tensor:
        """[...] of each rank -> [n, ...] on all."""
        out = x.new_empty(self.ranks, *x.shape)
        dist.all_gather_into_tensor(out.flatten(0, 1), x.contiguous(), group=self.group)
        return out

    def rows_of(self, tokens: int) -> slice:
        """Which of so many tokens this rank keeps between regions, where rows are split."""
        share = tokens // self.ranks
        return slice(self.rank * share, (self.rank + 1) * share)


def divide_layer(layer: nn.Module, config: ModelConfig, parts: Parts) -> nn.Module:
    """This rank's part of a layer of the plan, with the same names of parameters."""
    if isinstance(layer, Embedding | Head):
        first = first_of_slice(config.vocab_size, parts.rank, parts.ranks)
        weight = None if layer.weight is None else _part(layer.weight, 0, parts)
        if isinstance(layer, Embedding):
            return VocabularyEmbedding(weight, first, parts)
        return VocabularyHead(weight, first, parts, layer.loss)
    if isinstance(layer, RMSNorm):
        return SharedNorm(layer, parts) if parts.split_rows else layer
    if isinstance(layer, tuple(POSITION_LAYERS.values())):
        return PositionEmbeddingOfRows(layer, parts) if parts.split_rows else layer
    for module in list(layer.modules()):
        for name, dimension in list(cuts_of(module)):
            owner, leaf = module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            setattr(owner, leaf, _part(getattr(owner, leaf), dimension, parts))
        if isinstance(module, Attention | FeedForward):
            module.multiply = ColumnMaps(parts)
            last = "o_proj" if isinstance(module, Attention) else "down_proj"
            for name, linear in module.named_children():
                if isinstance(linear, AdaptedLinear):
                    linear.of_all[FACTORS[name == last]] = parts.shared
                    if name == last:
                        linear.first_input = first_of_slice(linear.in_features, parts.rank, parts.ranks)
            setattr(module, last, RowMap(getattr(module, last), parts))
        for name, norm in module.named_children():
            if isinstance(norm, RMSNorm) and (parts.split_rows or isinstance(module, Attention)):
                setattr(module, name, SharedNorm(norm, parts))
    return layer


def _part(parameter: nn.Parameter, dimension: int, parts: Parts) -> nn.Parameter:
    own = slice_of(parameter.data, dimension, parts.rank, parts.ranks).clone()
    part = nn.Parameter(own, requires_grad=parameter.requires_grad)
    internals.mark_as_part(part)
    return part


class ColumnMaps:
    """Takes the place of `model.seeded.multiply`: maps into this rank's heads or part of the feed-forward width.

    In backward the gradient of what they read is summed over the group while those of the weights are computed. Not so at
    ZeRO-3, which has a weight in place only around the call of its own module, and where there are adapters.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    @uncompiled
    def __call__(self, x: Tensor, documents: Documents | None, *maps: nn.Linear) -> tuple[Tensor, ...]:
        adapted = any(isinstance(each, AdaptedLinear) or not each.weight.requires_grad for each in maps)
        if adapted or any(hasattr(each.weight, "ds_id") for each in maps):
            return multiply(self.parts.enter(x), documents, *maps)
        tensors = [x, *(each.weight for each in maps), *(each.bias for each in maps)]
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            tensors = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
        return _Columns.apply(self.parts, *tensors)


class RowMap(nn.Linear):
    """A linear map out of this rank's heads or part of the width: the products of all ranks add up."""

    def __init__(self, whole: nn.Linear, parts: Parts) -> None:
        super().__init__(whole.in_features, whole.out_features, bias=False, device="meta")
        self.whole, self.parts = [whole], parts  # in a list: its parameters keep their names
        for name, parameter in whole.named_parameters(recurse=False):
            self.register_parameter(name, parameter)

    def forward(self, x: Tensor, documents: Documents | None = None) -> Tensor:
        out, whole = F.linear(x, self.weight), self.whole[0]
        if isinstance(whole, AdaptedLinear):
            out = whole.beside(x, out, documents)
        out = self.parts.leave(out)
        if self.bias is None:
            return out
        return out + (self.parts.shared(self.bias) if self.parts.split_rows else self.bias)


class SharedNorm(RMSNorm):
    """A norm that sees other heads or other tokens on each rank."""

    def __init__(self, norm: RMSNorm, parts: Parts) -> None:
        super().__init__(len(norm.weight), norm.eps)
        self.weight, self.parts = norm.weight, parts

    def forward(self, x: Tensor, documents: Documents | None = None) -> Tensor:
        return rms_norm(x, self.parts.shared(self.weight), self.eps)


class PositionEmbeddingOfRows(nn.Module):
    """A layer that adds positions, for this rank's part of the tokens."""

    def __init__(self, layer: nn.Module, parts: Parts) -> None:
        super().__init__()
        self.whole, self.parts = [layer], parts  # in a list: its parameters keep their names
        if isinstance(layer, LearnedPositionEmbedding):
            self.weight = layer.weight

    def forward(self, x: Tensor, documents: Documents) -> Tensor:
        here = documents.part(self.parts.rows_of(documents.position_ids.shape[1]))
        if not isinstance(self.whole[0], LearnedPositionEmbedding):
            return self.whole[0](x, here)
        return torch.func.functional_call(self.whole[0], {"weight": self.parts.shared(self.weight)}, (x, here))


class VocabularyEmbedding(nn.Module):
    """`model.llama.Embedding` with the vectors of some tokens; the others' come from the other ranks."""

    def __init__(self, weight: nn.Parameter, first: int, parts: Parts) -> None:
        super().__init__()
        self.weight, self.first, self.parts = weight, first, parts

    def forward(self, input_ids: Tensor, documents: Documents | None = None) -> Tensor:
        local = input_ids - self.first
        here = (local >= 0) & (local < len(self.weight))
        x = F.embedding(local.where(here, 0), self.weight).where(here.unsqueeze(-1), 0)
        return self.parts.leave(x)


class VocabularyHead(nn.Module):
    """`model.llama.Head` with the logits of some tokens. A chunk costs the group one exchange of two numbers a token."""

    def __init__(self, weight: nn.Parameter | None, first: int, parts: Parts, loss: HeadLoss) -> None:
        super().__init__()
        self.weight, self.first, self.parts, self.loss = weight, first, parts, loss

    def forward(
        self,
        x: Tensor,
        documents: Documents,
        targets: Tensor,
        z_loss_weight: float = 0.0,
        target_weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return self.loss(cross_entropy_of(self), x, documents, targets, z_loss_weight, target_weights)


def cross_entropy_of(layer: nn.Module) -> Callable[..., tuple[Tensor, Tensor]]:
    """`linear_cross_entropy` by the weight of a head, or of the embedding it is tied to, whole or divided."""
    weight: Any = layer.weight
    if not isinstance(layer, VocabularyEmbedding | VocabularyHead):
        return partial(linear_cross_entropy, weight=weight)
    parts = layer.parts
    tokens = CHUNK_TOKENS * parts.ranks  # as many logits at a time as with the whole vocabulary
    divided = partial(linear_cross_entropy, weight=weight, chunk_tokens=tokens)

    def entered(x: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        return divided(parts.enter(x), part=VocabularyPart(layer.first, parts.stack), **more)

    return entered


class _Columns(torch.autograd.Function):
    """x -> x W_i^T + b_i for several maps, as `Parts.enter` followed by them."""

    @staticmethod
    def forward(ctx: Any, parts: Parts, x: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
        weights, biases = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        ctx.parts, ctx.with_bias = parts, [bias is not None for bias in biases]
        ctx.save_for_backward(x, *weights)
        whole = gather(x, parts.group)() if parts.split_rows else x
        return tuple(F.linear(whole, weight, bias) for weight, bias in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        parts, (x, *weights) = ctx.parts, ctx.saved_tensors
        whole = gather(x, parts.group) if parts.split_rows else lambda: x
        grad_x = grads[0] @ weights[0]
        for grad, weight in zip(grads[1:], weights[1:], strict=True):
            grad_x += grad @ weight
        total = (scatter if parts.split_rows else sum_up)(grad_x, parts.group)
        flat = whole().flatten(0, -2)
        of_weights = [grad.flatten(0, -2).T @ flat for grad in grads]
        pairs = zip(grads, ctx.with_bias, strict=True)
        of_biases = [grad.flatten(0, -2).sum(0) if with_bias else None for grad, with_bias in pairs]
        return None, total(), *of_weights, *of_biases


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
