"""Causal attention in bf16 on CPUs by matrix products of whole blocks, for processors that multiply bf16 fast.

Like flash attention (Dao 2023, FlashAttention-2, 3.1) it holds the scores of a block of tokens at a time and makes them
again in backward; unlike torch's kernel for CPUs it leaves the products to oneDNN, hundreds of rows at a time. Such a
product comes back in bf16, which rounds large scores by more than a softmax stands. So what is subtracted from it anyway, the
row's largest score, and in backward the mean of the gradients of its probabilities, is subtracted within the product: by a
column more of the queries, over a row of ones of the keys. What is rounded is then small wherever it counts.

Legend: B rows, n tokens of a document, H query heads, K key/value heads, h and g those of a tile, d head width, b tokens of a
block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK_TOKENS = 256
FEWEST_TOKENS = 64
"""Of a document: torch's kernel is as fast for shorter ones."""
TILE_SCORES = 1 << 20
"""At a time and thread, of several heads where a document is short; of a block of one head at least."""
MORE = 2
"""Columns more: what is subtracted is the sum of two numbers in bf16."""


def by_products(q: Tensor, v: Tensor) -> bool:
    """Whether this is of use for q [B, n, H, d] and such values."""
    return q.device.type == "cpu" and v.dtype == torch.bfloat16 and q.shape[1] >= FEWEST_TOKENS


def attend_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`q` [B, n, H, d]; `k`, `v` [B, n, K, d], H a multiple of K; rows are one document each. Returns [B, n, H, d] in bf16."""
    out: Tensor = _CausalProducts.apply(q.to(v.dtype), k.to(v.dtype), v)
    return out


class _CausalProducts(torch.autograd.Function):
    """A probability is exp((q k - largest) / sqrt(d)) / total."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, largest = torch.empty_like(q), q.new_empty(q.shape[:3])
        totals, scratch = torch.empty(q.shape[:3]), _Scratch(q.shape[1])
        for row, shared, heads in _tiles(q, k):
            found = _mixed(q[row, :, heads], k[row, :, shared], v[row, :, shared], scratch)
            for whole, part in zip((out, largest, totals), found, strict=True):
                whole[row, :, heads] = part.transpose(0, 1)
        ctx.save_for_backward(q, k, v, out, largest, totals)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        saved = _Saved(*ctx.saved_tensors)
        dq, dk, dv = (torch.empty_like(x) for x in saved[:3])
        scratch, group = _Scratch(dq.shape[1]), dq.shape[2] // dk.shape[2]
        for row, shared, heads in _tiles(saved.q, saved.k):
            tile = saved.tile(row, shared, heads)
            size = tile.k.shape[1], *dq.shape[1::2]
            of_keys, of_values = (scratch(name, *size, dtype=torch.float32) for name in ("dk", "dv"))
            if heads.start % group == 0:  # the first of those that share them
                of_keys.zero_()
                of_values.zero_()
            dq[row, :, heads] = _gradients(tile, grad[row, :, heads], of_keys, of_values, scratch).transpose(0, 1)
            dk[row, :, shared], dv[row, :, shared] = of_keys.transpose(0, 1), of_values.transpose(0, 1)
        return dq, dk, dv


class _Saved(NamedTuple):
    """Of whole rows, each [B, n, ...]; of a tile, each [n, h or g, ...]."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    largest: Tensor
    """Negative, in bf16."""
    totals: Tensor

    def tile(self, row: int, shared: slice, heads: slice) -> _Saved:
        return _Saved(*(x[row, :, shared if x is self.k or x is self.v else heads] for x in self))


def _mixed(q: Tensor, k: Tensor, v: Tensor, scratch: _Scratch) -> tuple[Tensor, Tensor, Tensor]:
    """`q` [n, h, d]; `k`, `v` [n, g, d] -> [h, n, d], the largest scores' negatives and the totals [h, n]."""
    (tokens, heads, d), float32 = q.shape, torch.float32
    queries = scratch.widened("queries", q, 0)
    keys, values = _shared(scratch.widened("keys", k, 1).mT, heads), _shared(v.transpose(0, 1), heads)
    out, totals = scratch("out", heads, tokens, d), scratch("totals", heads, tokens, dtype=float32)
    for here in _blocks(tokens):
        near, seen = queries[:, here], slice(0, here.stop)
        scores = scratch("scores", heads, here.stop - here.start, here.stop)
        torch.bmm(near[..., :d], keys[:, :d, seen], out=scores)
        scratch.hide_later(scores[..., here])
        near[..., d] = scores.amax(-1).neg_()
        scores.baddbmm_(near, keys[..., seen], beta=0, alpha=d**-0.5)
        scratch.hide_later(scores[..., here])
        for of_head, total in zip(scores.exp_(), totals[:, here], strict=True):
            torch.sum(scratch("wide", *of_head.shape, dtype=float32).copy_(of_head), -1, out=total)
        out[:, here] = torch.bmm(scores, values[:, seen]) / totals[:, here, None]
    return out, queries[..., d], totals


def _gradients(tile: _Saved, grad: Tensor, dk: Tensor, dv: Tensor, scratch: _Scratch) -> Tensor:
    """Block by block of keys, each under all queries from there on. Returns the gradient of q [h, n, d] and adds to those of k
    and v [g, n, d], in float32."""
    (tokens, heads, d), float32 = tile.q.shape, torch.float32
    queries = scratch.widened("queries", tile.q, 0)
    queries[..., d] = tile.largest.T
    shares = scratch("wide", tokens, heads, d, dtype=float32).copy_(grad).div_(tile.totals.unsqueeze(-1))
    grads = scratch.widened("grads", shares, 0)
    mean = shares.copy_(grads[..., :d].transpose(0, 1)).mul_(tile.out).sum(-1).T
    grads[..., d] = -mean
    grads[..., d + 1] = -mean - grads[..., d].float()
    keys, values = (_shared(scratch.widened(name, x, 1), heads) for name, x in (("keys", tile.k), ("values", tile.v)))
    dq = scratch("dq", heads, tokens, d, dtype=float32).zero_()
    for here in _blocks(tokens):
        after, size = slice(here.start, tokens), (heads, tokens - here.start, here.stop - here.start)
        p = scratch("scores", *size).baddbmm_(queries[:, after], keys[:, here].mT, beta=0, alpha=d**-0.5)
        scratch.hide_later(p[:, : size[2]])
        ds = torch.bmm(grads[:, after], values[:, here].mT, out=scratch("of scores", *size)).mul_(p.exp_())
        dv[:, here] += _summed(torch.bmm(p.mT, grads[:, after, :d]), len(dv))
        dk[:, here] += _summed(torch.bmm(ds.mT, queries[:, after, :d]), len(dk)).mul_(d**-0.5)
        dq[:, after] += torch.bmm(ds, keys[:, here, :d])
    return dq.mul_(d**-0.5)


def _tiles(q: Tensor, k: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """A row, some key/value heads, and the query heads that see them, or some of these, in their order."""
    (rows, tokens, heads, _), shared = q.shape, k.shape[2]
    scores = TILE_SCORES * torch.get_num_threads()
    group, together = heads // shared, max(1, scores // (min(BLOCK_TOKENS, tokens) * tokens))
    few = _even(shared, max(1, together // group))
    step = _even(group, together) if together < group else few * group
    for row in range(rows):
        for first in range(0, shared, few):
            some = slice(first, min(first + few, shared))
            for head in range(some.start * group, some.stop * group, step):
                yield row, some, slice(head, min(head + step, some.stop * group))


def _even(number: int, most: int) -> int:
    """How many to take at a time, at most so many, that the last time is not left with few."""
    return -(-number // -(-number // most))


def _blocks(tokens: int) -> list[slice]:
    return [slice(first, min(first + BLOCK_TOKENS, tokens)) for first in range(0, tokens, BLOCK_TOKENS)]


def _shared(x: Tensor, heads: int) -> Tensor:
    """[g, ...] -> [h, ...]."""
    return x.repeat_interleave(heads // len(x), 0) if len(x) < heads else x


def _summed(x: Tensor, shared: int) -> Tensor:
    """[h, ...] -> [g, ...]."""
    return x.unflatten(0, (shared, -1)).sum(1, dtype=torch.float32) if shared < len(x) else x


class _Scratch:
    """Memory that all tiles are computed in, by name: new pages for each would take as long as the softmax."""

    def __init__(self, tokens: int) -> None:
        self._memory: dict[str, Tensor] = {}
        block = min(tokens, BLOCK_TOKENS)
        self._later = torch.full((block, block), -math.inf, dtype=torch.bfloat16).triu_(1)

    def __call__(self, name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        if name not in self._memory or self._memory[name].numel() < math.prod(shape):
            self._memory[name] = torch.empty(math.prod(shape), dtype=dtype)
        return self._memory[name][: math.prod(shape)].view(shape)

    def widened(self, name: str, x: Tensor, value: float) -> Tensor:
        """[n, h, d] -> [h, n, d + 2] in bf16."""
        wide = self(name, x.shape[1], x.shape[0], x.shape[2] + MORE)
        wide[..., :-MORE], wide[..., -MORE:] = x.transpose(0, 1), value
        return wide

    def hide_later(self, scores: Tensor) -> None:
        """Of a block's tokens [h, b, b] from those before them."""
        b = scores.shape[-1]
        scores += self._later[:b, :b]
