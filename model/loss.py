"""Output projection and cross-entropy in one, chunk by chunk. Legend: N tokens, C of a chunk, D model, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .compiled import compiled

IGNORED = -100
"""Target of a token that does not count."""
CHUNK_TOKENS, CHUNK_TOKENS_CUDA = 1024, 4096
"""Rows of logits that exist at a time. Each chunk adds to a [V, D] gradient, so far fewer would cost bandwidth."""
SLAB_ELEMENTS = 1 << 19
"""Of logits whose softmax is made on CPUs, or of a matrix that is converted, at a time: wide temporaries stay in the cache."""


class VocabularyPart(NamedTuple):
    """Says that `weight` is only some rows of the output projection, and other processes have the rest."""

    first: int
    """Token id of the first row."""
    gather: Callable[[Tensor], Tensor]
    """[2, C] of every process -> [P, 2, C], the same on all of them."""


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    z_loss_weight: float = 0.0,
    chunk_tokens: int | None = None,
    part: VocabularyPart | None = None,
    target_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of `softmax(x @ weight.T)` without the [N, V] logits.

    Args: `x` [..., D]; `weight` [V, D]; `targets` int64 [...], `IGNORED` where a token does not count; `target_weights`
    [...], by which a token's terms are multiplied (default 1). With weights, which come with objectives that leave many
    tokens out, only the counted tokens are multiplied with `weight`.
    Returns, in float32 (or float64 for float64 inputs), the objective, which is the weighted sum over the counted tokens of
    cross-entropy + z_loss_weight * logsumexp(logits)^2 (Chowdhery et al. 2022, section 5) and carries the gradient, and the
    cross-entropy of each token in nats, shape of `targets`, 0 where it does not count, which carries none. With `part` every
    process gets those of the whole vocabulary, the gradient of its rows of `weight`, and its share of the gradient of `x`, to
    be summed over all.

    The gradients are made in the forward pass while a chunk's logits exist (they are linear in the incoming gradient),
    so backward recomputes nothing; the gradient of `weight` is summed in float32. Under `no_grad` none is made.
    """
    make_gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    flat, flat_targets = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    counted = None
    if target_weights is not None:
        counted = (flat_targets != IGNORED).nonzero().squeeze(1)
        flat, flat_targets, target_weights = flat[counted], flat_targets[counted], target_weights.reshape(-1)[counted]
    chunk_tokens = chunk_tokens or (CHUNK_TOKENS_CUDA if x.is_cuda else CHUNK_TOKENS)
    problem = flat, weight, flat_targets, target_weights
    objective, losses = _LinearCrossEntropy.apply(*problem, z_loss_weight, chunk_tokens, part, make_gradients)
    if counted is not None:
        losses = losses.new_zeros(targets.numel()).index_copy(0, counted, losses)
    return objective, losses.view(targets.shape)


def reported_sums(losses: Tensor, target_weights: Tensor | None, routing: Tensor | None, adapters: int) -> Tensor:
    """What is known of the losses [B, T] of tokens: their sum, weighted if the objective weighs, then those of each adapter
    (`routing` int64 [B] or [B, T]: which), unweighted. Float64 [1 + adapters].
    """
    if routing is None:
        whole = losses if target_weights is None else losses * target_weights
        return F.pad(whole.sum(dtype=torch.float64)[None], (0, adapters))
    parts = losses.double() if routing.dim() == 2 else losses.flatten(1).sum(1, dtype=torch.float64)
    of_adapters = parts.new_zeros(adapters).index_add(0, routing.flatten(), parts.flatten())
    return torch.cat([parts.sum()[None], of_adapters])


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        target_weights: Tensor | None,
        z_loss_weight: float,
        chunk_tokens: int,
        part: VocabularyPart | None,
        make_gradients: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        objective, losses = x.new_zeros((), dtype=wide), x.new_empty(len(x), dtype=wide)
        want_x, want_weight = (make_gradients and need for need in ctx.needs_input_grad[:2])
        grad_x = torch.empty_like(x) if want_x else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if want_weight and not len(x) else None
        for start in range(0, len(x), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = x[rows] @ weight.T
            scale = None if target_weights is None else target_weights[rows].to(wide)
            for piece in _softmax_pieces(logits, x.is_cuda or part is not None):
                problem = logits[piece], targets[rows][piece], None if scale is None else scale[piece]
                softmax = _compiled_softmax if x.is_cuda and part is None else _softmax
                nll, z = softmax(*problem, wide, z_loss_weight, part, make_gradients)
                losses[rows][piece] = nll
                terms = nll + z_loss_weight * z
                objective += (terms if problem[2] is None else terms * problem[2]).sum()
            if grad_x is not None:
                grad_x[rows] = logits @ weight
            if want_weight:
                of_chunk = logits.T @ x[rows]
                grad_weight = of_chunk.to(wide) if grad_weight is None else _add(grad_weight, of_chunk)
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.mark_non_differentiable(losses)
        return objective, losses

    @staticmethod
    def backward(ctx: Any, grad_objective: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        if grad_x is not None:
            grad_x = _scaled(grad_x, grad_objective, grad_x.dtype)
        if grad_weight is not None:
            grad_weight = _scaled(grad_weight, grad_objective, ctx.weight_dtype)
        return grad_x, grad_weight, *[None] * 6


def _scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The product in the wide dtype of `factor`: 1 / targets rounded to bfloat16 would put a bias on every gradient."""
    product = torch.empty_like(grad, dtype=dtype)
    for rows, into in _slabs(grad, product):
        torch.mul(rows.to(factor.dtype), factor, out=into)
    return product


def _add(total: Tensor, more: Tensor) -> Tensor:
    for rows, added in _slabs(total, more):
        rows.add_(added)
    return total


def _slabs(*matrices: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """The same rows of all, so few that their conversion from one dtype to another stays in a CPU's cache."""
    rows, width = matrices[0].shape
    step = max(1, SLAB_ELEMENTS // width) if matrices[0].device.type == "cpu" else max(1, rows)
    return zip(*(matrix.split(step) for matrix in matrices), strict=True)


def _softmax_pieces(logits: Tensor, at_once: bool) -> list[slice]:
    rows, vocabulary = logits.shape
    step = max(1, rows if at_once else SLAB_ELEMENTS // vocabulary)
    return [slice(first, first + step) for first in range(0, rows, step)]


def _compiled_softmax(*problem: Any) -> tuple[Tensor, Tensor]:
    """Two passes over the logits instead of ten; compiled for any number of rows of one vocabulary."""
    for rows in problem[:3]:
        if rows is not None:
            torch._dynamo.maybe_mark_dynamic(rows, 0)
    return compiled(_fused_softmax)(*problem)


def _fused_softmax(
    logits: Tensor,
    targets: Tensor,
    target_weights: Tensor | None,
    wide: torch.dtype,
    z_loss_weight: float,
    part: None,
    make_gradients: bool,
) -> tuple[Tensor, Tensor]:
    """`_softmax` of a whole vocabulary in operators that a compiler makes one kernel of."""
    counted = targets != IGNORED
    index = targets.where(counted, 0).unsqueeze(1)
    widened = logits.to(wide)
    log_z = widened.logsumexp(-1, keepdim=True)
    nll = (log_z - logits.gather(1, index).to(wide)).squeeze(1).where(counted, 0)
    z = log_z.squeeze(1).square().where(counted, 0)
    if make_gradients:
        scale = (counted.to(wide) if target_weights is None else target_weights.where(counted, 0)).unsqueeze(1)
        at_target = torch.arange(logits.shape[1], device=logits.device) == index
        grad = (widened - log_z).exp() * (scale * (1 + 2 * z_loss_weight * log_z)) - scale * at_target
        logits.copy_(grad)
    return nll, z


def _softmax(
    logits: Tensor,
    targets: Tensor,
    target_weights: Tensor | None,
    wide: torch.dtype,
    z_loss_weight: float,
    part: VocabularyPart | None,
    make_gradients: bool,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and logsumexp^2 of the rows of `logits` [C, V], 0 where they are not counted.

    With `make_gradients` d objective / d logits takes the place of the logits.
    """
    counted = here = targets != IGNORED
    if part is not None:
        targets = targets - part.first
        here = counted & (targets >= 0) & (targets < logits.shape[1])
    index = targets.where(here, 0).unsqueeze(1)
    log_p, at_target = torch.log_softmax(logits, -1, dtype=wide), logits.gather(1, index)
    log_p_target = log_p.gather(1, index)
    log_z = at_target - log_p_target
    if part is not None:
        parts = part.gather(torch.stack([log_z.squeeze(1), at_target.squeeze(1).where(here, 0).to(wide)]))
        whole_log_z = parts[:, 0].logsumexp(0).unsqueeze(1)
        log_p += log_z - whole_log_z
        log_p_target, log_z = parts[:, 1].sum(0).unsqueeze(1) - whole_log_z, whole_log_z
    nll, z = -log_p_target.squeeze(1).where(counted, 0), log_z.squeeze(1).square().where(counted, 0)
    if not make_gradients:
        return nll, z
    scale = (counted.to(wide) if target_weights is None else target_weights.where(counted, 0)).unsqueeze(1)
    row_scale = scale * (1 + 2 * z_loss_weight * log_z)
    grad_at_target = log_p_target.exp() * row_scale - scale
    grad = torch.mul(log_p.exp_(), row_scale, out=logits)
    if part is not None:
        grad_at_target = grad_at_target.where(here.unsqueeze(1), grad.gather(1, index))
    rows = torch.arange(len(grad), device=grad.device)
    grad.index_put_((rows, index.squeeze(1)), grad_at_target.squeeze(1).to(grad.dtype))  # scatter_ copies it all, twice
    return nll, z
