"""Causal attention inside documents: `softmax(Q K^T / sqrt(d)) V` (Vaswani et al. 2017), with memory linear in T.

Legend: B batch, T tokens of a row, n tokens of a document, H query heads, K key/value heads, d head width, W window.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor

from .documents import Documents

try:
    from torch.nn.attention.varlen import varlen_attn

    # the form with windows and grouped heads; the first releases of this module had neither
    HAS_VARLEN = {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys()
except ImportError:
    HAS_VARLEN = False


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None = None) -> Tensor:
    """Each token attends to itself and to earlier tokens of its own document, at most `window` tokens in all.

    Args: `q` [B, T, H, d]; `k`, `v` [B, T, K, d], H a multiple of K. Returns [B, T, H, d].
    CUDA in half precision runs all documents in one variable-length flash kernel; elsewhere
    `scaled_dot_product_attention` runs once a document, or once in all where every row is one document.
    """
    if HAS_VARLEN and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0:
        longest, cu_seqlens = documents.max_length, documents.cu_seqlens
        left = -1 if window is None else window - 1
        flat = (x.flatten(0, 1) for x in (q, k, v))
        grouped = q.shape[2] != k.shape[2]
        out = varlen_attn(*flat, cu_seqlens, cu_seqlens, longest, longest, window_size=(left, 0), enable_gqa=grouped)
        return out.view_as(q)
    if len(documents.lengths) == len(q):
        return _attend_document(q, k, v, window)
    pieces = (x.flatten(0, 1).split(documents.lengths) for x in (q, k, v))
    out = [_attend_document(*(x.unsqueeze(0) for x in piece), window) for piece in zip(*pieces, strict=True)]
    return torch.cat(out, dim=1).view_as(q)


class KeyValueCache:
    """Keys and values of one block for the tokens decoded so far, [B, n, K, d], in buffers of fixed size."""

    def __init__(self, capacity_tokens: int):
        self.capacity_tokens, self.tokens = capacity_tokens, 0
        self.buffers: tuple[Tensor, Tensor] | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens; returns all of them so far."""
        if self.buffers is None:
            shape = (k.shape[0], self.capacity_tokens, *k.shape[2:])
            self.buffers = k.new_empty(shape), v.new_empty(shape)
        end = self.tokens + k.shape[1]
        for buffer, new in zip(self.buffers, (k, v), strict=True):
            buffer[:, self.tokens : end] = new
        self.tokens = end
        return tuple(buffer[:, :end] for buffer in self.buffers)


def attend_cached(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """One new token per row, `q` [B, 1, H, d], over all cached ones, `k`, `v` [B, n, K, d]. Returns [B, 1, H, d]."""
    assert q.shape[1] == 1, "after the prompt, one token at a time"
    if window is not None:
        k, v = k[:, -window:], v[:, -window:]
    return _sdpa(q, k, v)


def _attend_document(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Rows that are one document each: [B, n, H, d]."""
    if window is None or window >= q.shape[1]:
        return _sdpa(q, k, v, is_causal=True)
    return _attend_window(q, k, v, window)


def _attend_window(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Blocks of W queries, each over its own and the previous block of keys: n * 2W scores instead of n * n."""
    rows, n = q.shape[:2]
    blocks = -(-n // window)
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, blocks * window - n)).unflatten(1, (blocks, window)) for x in (q, k, v))
    k, v = (torch.cat([F.pad(x[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0)), x], dim=2) for x in (k, v))
    offset = torch.arange(2 * window, device=q.device) - torch.arange(window, device=q.device).unsqueeze(1)
    near = (offset > 0) & (offset <= window)  # [W, 2W]: key offset `window` is the query itself
    mask = near.expand(blocks, window, 2 * window).clone()
    mask[0, :, :window] = False
    mask = mask.repeat(rows, 1, 1).unsqueeze(1)
    out = _sdpa(*(x.flatten(0, 1) for x in (q, k, v)), attn_mask=mask)
    return out.unflatten(0, (rows, blocks)).flatten(1, 2)[:, :n]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **mask) -> Tensor:
    """`scaled_dot_product_attention` for [B, T, H, d], with key/value heads shared by groups of query heads."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **mask).transpose(1, 2)
