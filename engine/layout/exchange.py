"""What ranks that share tokens exchange: collectives that wait as late as they can, and their derivatives.

Legend: B batch, T tokens of the rows that a group works on, n ranks of the group.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

Pending = Callable[[], Tensor]
"""Waits for a collective that is under way and returns its result."""


def sum_up(x: Tensor, group: dist.ProcessGroup) -> Pending:
    total = x.clone(memory_format=torch.contiguous_format)
    work = dist.all_reduce(total, group=group, async_op=True)

    def result() -> Tensor:
        work.wait()
        return total

    return result


def gather(x: Tensor, group: dist.ProcessGroup) -> Pending:
    """[B, T / n, ...] of each rank -> [B, T, ...]."""
    parts = x.new_empty(group.size(), *x.shape)
    work = dist.all_gather_into_tensor(parts.flatten(0, 1), x.contiguous(), group=group, async_op=True)

    def result() -> Tensor:
        work.wait()
        return parts.movedim(0, 1).flatten(1, 2)

    return result


def scatter(x: Tensor, group: dist.ProcessGroup) -> Pending:
    """The sum of [B, T, ...] over the group -> this rank's [B, T / n, ...] of it."""
    parts = x.unflatten(1, (group.size(), -1)).movedim(1, 0).contiguous()
    out = parts.new_empty(parts.shape[1:])
    work = dist.reduce_scatter_tensor(out, parts.flatten(0, 1), group=group, async_op=True)

    def result() -> Tensor:
        work.wait()
        return out

    return result


class SumGradient(torch.autograd.Function):
    """The tensor itself; its gradient is summed over the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return sum_up(grad, ctx.group)(), None


class Sum(torch.autograd.Function):
    """The sum over the group; the gradient is the same on all ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return sum_up(x, group)()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Gather(torch.autograd.Function):
    """[B, T / n, ...] -> [B, T, ...]; the gradient is summed over the group, and each rank keeps its part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gather(x, group)()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return scatter(grad, ctx.group)(), None


def gather_uneven(x: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, int]:
    """[n_i, D] of each rank -> all of them [N, D], with gradients as of `Gather`, and the place of this rank's first."""
    counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(group.size())]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device), group=group)
    numbers = [int(count) for count in counts]
    whole = Gather.apply(F.pad(x, (0, 0, 0, max(numbers) - len(x)))[None], group)[0]
    parts = [part[:number] for part, number in zip(whole.chunk(group.size()), numbers, strict=True)]
    return torch.cat(parts), sum(numbers[: group.rank()])


class Scatter(torch.autograd.Function):
    """The sum over the group of [B, T, ...], of which each rank keeps [B, T / n, ...]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return scatter(x, group)()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gather(grad, ctx.group)(), None
