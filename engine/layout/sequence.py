"""Sequence parallelism: every rank of a group holds a part of each row's tokens, and only attention needs those of others.

By heads, two all-to-all exchanges a block turn the cut by tokens into one by heads (Jacobs et al. 2023, DeepSpeed-Ulysses).
By keys, the queries stay where they are, and each rank is sent the keys and values that they see, which are few in packed
rows and with grouped heads (Llama Team 2024, The Llama 3 Herd of Models, section 3.3.2, which gathers all of them); there may
then be more ranks than heads. Everything else in the model works on tokens one by one. To ZeRO these ranks are data-parallel
ranks like any other: each has the gradient of its own tokens' share of the loss, and the average over all ranks, which the
loss is weighted for, is the same at every stage.

Legend: B batch, T tokens of a row, n ranks, t = T / n, H query heads, K key/value heads, d head width, m keys that are seen.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor, nn

from engine.layout.deal import dealt_columns
from engine.layout.mesh import EXCHANGE, Mesh
from model.attention import attend
from model.config import ModelConfig
from model.documents import Documents
from model.llama import Attention
from model.part_attention import RowPart, attend_part
from model.segments import seen_keys, segments
from model.visibility import Visibility


class UlyssesAttention(nn.Module):
    """Takes the place of `model.attention.attend`: the same arguments for this rank's T / n tokens of each row."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.size = group.size()
        self.attend = attend
        self.exchange = DistributedAttention(self._attend_here, group, scatter_idx=2, gather_idx=1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, visibility: Visibility) -> Tensor:
        """`q` [B, T / n, H, d], `k` and `v` [B, T / n, K, d]; `documents` of the whole rows. Returns [B, T / n, H, d]."""
        if (copies := self.size // k.shape[2]) > 1:  # every rank needs a key/value head of its own
            k, v = (x.repeat_interleave(copies, dim=2) for x in (k, v))
        return self.exchange(q, k, v, 0, None, documents, visibility)

    def _attend_here(self, *arguments: Any) -> Tensor:
        """Whole rows, a part of the heads."""
        return self.attend(*arguments)


class KeyAttention(nn.Module):
    """Takes the place of `model.attention.attend`: this rank's queries over the keys that they see, wherever those are."""

    def __init__(self, group: dist.ProcessGroup, mesh: Mesh) -> None:
        super().__init__()
        self.group, self.mesh = group, mesh
        self.attend = attend_part

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, visibility: Visibility) -> Tensor:
        """`q` [B, t, H, d], `k` and `v` [B, t, K, d]; `documents` of the columns that are here. Returns [B, t, H, d]."""
        if documents.exchange is None:
            columns = dealt_columns(documents, visibility, self.mesh.sequence)
            documents.exchange = plan_exchange(documents, visibility, columns, self.mesh.sequence_rank, q.device)
        plan: KeyExchange = documents.exchange
        q, k = q.to(v.dtype), k.to(v.dtype)  # normalised ones may be wider
        both = torch.stack([k, v], dim=2).flatten(0, 1)  # [B t, 2, K, d]
        keys, values = _SeenKeys.apply(both, plan, self.group).unbind(1)
        return self.attend(q, keys, values, documents, visibility, plan.part)


class KeyExchange(NamedTuple):
    """Which keys a rank keeps, sends and receives in every block. Places are those of its flattened columns [B t]."""

    part: RowPart
    kept: Tensor
    """int64: places of the rank's own keys that its queries see."""
    sent: list[Tensor]
    """By rank of the group: places of the keys that its queries see; none for the rank itself."""
    received: list[int]
    """By rank: how many of its keys are seen here."""
    order: Tensor
    """int64 [m]: sorts those that are kept and received, in the order of ranks, by their places in the flattened rows."""
    silent: bool
    """Whether no rank needs anything of another."""


def plan_exchange(
    documents: Documents, visibility: Visibility, columns: list[Tensor], rank: int, device: torch.device
) -> KeyExchange:
    """What one of the ranks that have these columns does. Every rank finds out by itself what the others need."""
    rows, tokens = len(documents.position_ids), sum(documents.lengths)
    found = [segments(documents, each) for each in columns]
    seen = [seen_keys(each, visibility, tokens) for each in found]
    masks = [
        torch.zeros(rows, tokens // rows, dtype=torch.bool).index_fill(1, each, True).flatten() for each in columns
    ]
    place = masks[rank].cumsum(0) - 1
    others = [peer for peer in range(len(columns)) if peer != rank]
    sent = [place[(seen[peer] & masks[rank]) if peer != rank else []] for peer in range(len(columns))]
    kept = (seen[rank] & masks[rank]).nonzero().flatten()
    taken = [(seen[rank] & masks[peer]).nonzero().flatten() for peer in others]
    counts = [0 if peer == rank else int((seen[rank] & masks[peer]).sum()) for peer in range(len(columns))]
    silent = not any((wanted & ~own).any() for wanted, own in zip(seen, masks, strict=True))
    return KeyExchange(
        RowPart(found[rank], seen[rank]),
        place[kept].to(device),
        [each.to(device) for each in sent],
        counts,
        torch.cat([kept, *taken]).argsort().to(device),
        silent,
    )


class _SeenKeys(torch.autograd.Function):
    """[B t, ...] of each rank -> [m, ...], what its queries see of all; the gradients go back and add up in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: KeyExchange, group: dist.ProcessGroup) -> Tensor:
        ctx.plan, ctx.group, ctx.tokens = plan, group, len(x)
        here = [x.index_select(0, plan.kept)]
        if not plan.silent:
            here.append(_exchange(x.index_select(0, torch.cat(plan.sent)), _lengths(plan), plan.received, group))
        return torch.cat(here).index_select(0, plan.order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        plan: KeyExchange = ctx.plan
        by_rank = torch.empty_like(grad)
        by_rank[plan.order] = grad
        kept, received = by_rank.split([len(plan.kept), sum(plan.received)])
        total = grad.new_zeros(ctx.tokens, *grad.shape[1:], dtype=torch.promote_types(grad.dtype, torch.float32))
        total[plan.kept] = kept.to(total.dtype)
        if not plan.silent:
            returned = _exchange(received, plan.received, _lengths(plan), ctx.group)
            for places, part in zip(plan.sent, returned.split(_lengths(plan)), strict=True):
                total[places] += part
        return total.to(grad.dtype), None, None


def _lengths(plan: KeyExchange) -> list[int]:
    return [len(places) for places in plan.sent]


def _exchange(x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out


def share_rows(model: nn.Module, group: dist.ProcessGroup, mesh: Mesh) -> None:
    """Let the ranks of a sequence group work on the same rows."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = KeyAttention(group, mesh) if mesh.exchange == "keys" else UlyssesAttention(group)


def losses_of_whole_rows(group: dist.ProcessGroup) -> Callable[[Tensor, Documents], Tensor]:
    """From those of the tokens that each rank of a sequence group has; what mixes likelihoods depends on them."""

    def whole_rows(losses: Tensor, documents: Documents) -> Tensor:
        whole = losses.new_zeros(*losses.shape[:-1], sum(documents.lengths) // len(documents.position_ids))
        whole[..., documents.columns] = losses
        dist.all_reduce(whole, group=group)
        return whole

    return whole_rows


def sequence_problems(config: ModelConfig, mesh: Mesh, seq_length: int) -> list[str]:
    """Why the rows and heads of a model cannot be cut over the ranks of a sequence group."""
    n, problems = mesh.sequence, []
    heads, kv_heads = config.num_attention_heads // mesh.tensor, max(config.kv_heads // mesh.tensor, 1)
    legal = [s for s in range(2, heads + 1) if heads % s == 0 and (kv_heads % s == 0 or s % kv_heads == 0)]
    if n > 1 and mesh.exchange == "heads" and n not in legal:
        problems.append(
            f"sequence_parallel_size {n} does not divide the model's {heads} attention heads over {kv_heads} key/value "
            f"heads{' of a tensor-parallel rank' * (mesh.tensor > 1)}: use {' or '.join(map(str, legal)) or 'another layout'}, "
            f'or "{EXCHANGE}": "keys"'
        )
    if mesh.split_rows and seq_length // n % mesh.tensor:
        problems.append(
            f"tensor_parallel.split_rows does not divide {seq_length // n} tokens of a row over {mesh.tensor} ranks: set it "
            "to false, or use rows of a multiple"
        )
    if seq_length % n:
        problems.append(f"sequence_parallel_size {n} does not divide rows of {seq_length} tokens: use a divisor of it")
    return problems
