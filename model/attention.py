"""Attention inside documents: `softmax(Q K^T / sqrt(d)) V` (Vaswani et al. 2017), with memory linear in T.

What is visible is said in visibility.py; here the kernel is chosen. The causal mask goes to variable-length flash attention
on CUDA (rows of one document each to cuDNN, where that is faster), elsewhere to `scaled_dot_product_attention` or, in bf16 where
a CPU is faster so, to matrix products (causal_products.py); chunks that see themselves in both directions go to FlexAttention
on CUDA and to blocks of flash attention on CPUs (block_attention.py).

Legend: B batch, T tokens of a row, n tokens of a document, H query heads, K key/value heads, d head width, W window.
"""

from __future__ import annotations

import inspect
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from .block_attention import attend_blocks
from .causal_products import attend_products, by_products
from .compiled import compiled
from .documents import Documents
from .visibility import Tokens, Visibility

CAUSAL = Visibility()


def attend(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, visibility: Visibility = CAUSAL, products: bool = False
) -> Tensor:
    """Each token attends to what `visibility` lets it see. `q` [B, T, H, d]; `k`, `v` [B, T, K, d], H a multiple of K.

    `products`: by products of blocks where that is possible (causal_products.py). Returns [B, T, H, d].
    """
    if varlen_takes(q, documents, visibility):
        if len(documents.lengths) == len(q) and visibility.window is None and _has_faster_rows(q.device):
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
                return _sdpa(q, k, v, is_causal=visibility.span == 1)
        return _attend_varlen(q, k, v, documents, visibility)
    if visibility.span != 1 or documents.copies == 2:
        return (_attend_flex if q.is_cuda else attend_blocks)(q, k, v, documents, visibility)
    if len(documents.lengths) == len(q):
        return _attend_document(q, k, v, visibility.window, products)
    pieces = (x.flatten(0, 1).split(documents.lengths) for x in (q, k, v))
    out = [
        _attend_document(of_q.unsqueeze(0), of_k.unsqueeze(0), of_v.unsqueeze(0), visibility.window, products)
        for of_q, of_k, of_v in zip(*pieces, strict=True)
    ]
    return torch.cat(out, dim=1).view_as(q)


def varlen_takes(q: Tensor, documents: Documents, visibility: Visibility) -> bool:
    """Whether the kernel has these masks, on this device and for heads of this kind."""
    masks = (visibility.span == 1 or visibility.span is None) and documents.copies == 1
    heads = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0
    return masks and heads and "window_size" in _varlen()[1]  # not in the first releases that have it


@cache
def _varlen() -> tuple[Any, frozenset[str]]:
    """torch's kernel, which loads its compiler, and the names of what it takes; none where torch has no such kernel."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None, frozenset()
    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


@cache
def _has_faster_rows(device: torch.device) -> bool:
    """From Hopper on cuDNN attends over rows of one length in half of the time of the variable-length kernel."""
    return torch.cuda.get_device_capability(device)[0] >= 9


def _attend_varlen(q: Tensor, k: Tensor, v: Tensor, documents: Documents, visibility: Visibility) -> Tensor:
    """All documents in one flash kernel, causal or bidirectional."""
    starts = documents.cu_seqlens, documents.max_length
    return run_varlen(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), starts, starts, visibility).view_as(q)


def run_varlen(
    q: Tensor, k: Tensor, v: Tensor, of_queries: tuple[Tensor, int], of_keys: tuple[Tensor, int], visibility: Visibility
) -> Tensor:
    """Stretches of queries [n, H, d], each over one of keys [m, K, d], causal or bidirectional.

    `of_queries`, `of_keys`: where the stretches begin, int32, and how long the longest is. Returns [n, H, d].
    """
    left = -1 if visibility.window is None else visibility.window - 1
    right = 0 if visibility.span == 1 else -1
    (cu_q, longest_q), (cu_k, longest_k) = of_queries, of_keys
    options: dict[str, Any] = {"window_size": (left, right)}
    varlen_attn, taken = _varlen()
    if "enable_gqa" in taken:  # torch 2.11 takes grouped heads without being told
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    out = varlen_attn(q, k, v, cu_q, cu_k, longest_q, longest_k, **options)
    assert isinstance(out, Tensor), "only asked for more it gives a tuple"
    return out


def _attend_flex(q: Tensor, k: Tensor, v: Tensor, documents: Documents, visibility: Visibility) -> Tensor:
    """All rows as one sequence under a block-sparse mask (Dong et al. 2024, Flex Attention)."""
    if documents.block_mask is None:
        tokens = documents.tokens()
        documents.block_mask = mask_of_blocks(visibility, tokens, tokens)
    return run_flex(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), documents.block_mask).view_as(q)


def mask_of_blocks(visibility: Visibility, queries: Tokens, keys: Tokens) -> BlockMask:
    def sees(_row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visibility.sees(queries.at(query), keys.at(key))

    device = queries.document.device
    sizes = len(queries.document), len(keys.document)
    make: Any = compiled(create_block_mask) if device.type == "cuda" else create_block_mask
    return make(sees, None, None, *sizes, device)


def run_flex(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Tensor:
    """`q` [n, H, d], `k` and `v` [m, K, d] -> [n, H, d]."""
    flat = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))  # [1, H, n, d]
    kernel: Any = compiled(flex_attention) if q.is_cuda else flex_attention
    out = kernel(*flat, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])
    return out.squeeze(0).transpose(0, 1)


def use_products(model: nn.Module) -> None:
    """Let all attention of a model be by products where that is possible."""
    module: Any
    for module in model.modules():
        if getattr(module, "attend", None) is attend:
            module.attend = partial(attend, products=True)


class KeyValueCache:
    """Keys and values of one block for the tokens decoded so far, [B, n, K, d], in buffers of fixed size."""

    def __init__(self, capacity_tokens: int) -> None:
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
        keys, values = self.buffers
        return keys[:, :end], values[:, :end]


def attend_cached(q: Tensor, k: Tensor, v: Tensor, visibility: Visibility) -> Tensor:
    """The last c tokens of a document, `q` [B, c, H, d], over all n of it, `k`, `v` [B, n, K, d]: the next ones of a causal
    model, or those of one chunk. Returns [B, c, H, d]."""
    new, window = q.shape[1], visibility.window
    if window is not None:
        k, v = k[:, 1 - window - new :], v[:, 1 - window - new :]
    if new == 1 or visibility.span != 1:
        return _sdpa(q, k, v)
    back = torch.arange(k.shape[1] - new, k.shape[1], device=q.device)[:, None] - torch.arange(
        k.shape[1], device=q.device
    )
    return _sdpa(q, k, v, attn_mask=(back >= 0) & (back < (window or k.shape[1])))


def _attend_document(q: Tensor, k: Tensor, v: Tensor, window: int | None, products: bool) -> Tensor:
    """Rows that are one document each: [B, n, H, d]."""
    if window is None or window >= q.shape[1]:
        if products and by_products(q, v):
            return attend_products(q, k, v)
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


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **mask: Any) -> Tensor:
    """`scaled_dot_product_attention` for [B, T, H, d], with key/value heads shared by groups of query heads."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **mask).transpose(1, 2)
