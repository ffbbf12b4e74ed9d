"""Likelihoods of several members mixed into one, by weights that a document's earlier tokens have earned.

Of the targets x_1, x_2, ... of a document, with a prior pi over the members i and a share g between 0 and 1:

    p(x_t) = sum_i w_i(t) p_i(x_t),    w_i(1) = pi_i,    w_i(t + 1) proportional to (w_i(t) p_i(x_t))^g pi_i^(1 - g)

g = 0 is a fixed prior for every token. g = 1 is the exact mixture of documents: p(x_1 x_2 ...) = sum_i pi_i p_i(x_1 x_2 ...), so
a document costs at most log 1 / pi_i more than under any single member. Between them the past is forgotten at the rate g (an
exponential form of the fixed share of Herbster and Warmuth 1998, Tracking the Best Expert).

In logarithms w(t) = softmax(log pi + v(t)) with v_i(1) = 0 and v_i(t + 1) = g (v_i(t) + log p_i(x_t)): what normalises the
weights adds one number to all members, which the softmax does not see.

Legend: N members, B batch, T tokens of a row, D model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .loss import IGNORED


class Mixed(NamedTuple):
    """A batch under the mixture."""

    log_likelihoods: Tensor
    """log p(x_t) in nats, [B, T]."""
    log_weights: Tensor
    """log w_i(t), [N, B, T]."""
    log_responsibilities: Tensor
    """log of w_i(t) p_i(x_t) / p(x_t), [N, B, T]: which member made a token."""


def mix(log_likelihoods: Tensor, begins: Tensor, log_prior: Tensor, share: float) -> Mixed:
    """`log_likelihoods` [N, B, T]: log p_i of each target, 0 where there is none; `begins` bool [B, T]: where documents do;
    `log_prior` [N] or of rows [N, B], normalised; `share`: g. Differentiable in the likelihoods and the prior. Float64 keeps
    long documents exact.
    """
    evidence = _evidence(log_likelihoods, begins, share)
    log_weights = (log_prior.view(len(log_prior), -1, 1) + evidence).log_softmax(0)
    joint = log_weights + log_likelihoods
    mixed = joint.logsumexp(0)
    return Mixed(mixed, log_weights, joint - mixed)


def _evidence(log_likelihoods: Tensor, begins: Tensor, share: float) -> Tensor:
    """v of the module's docstring: a recurrence v' = a v + b, of which pairs of neighbours, of pairs, ... are made one."""
    factor = (~begins * share).to(log_likelihoods.dtype)
    factor[:, 0] = 0
    total = torch.zeros_like(log_likelihoods)
    total[..., 1:] = factor[:, 1:] * log_likelihoods[..., :-1]
    step = 1
    while step < begins.shape[1]:
        total = torch.cat([total[..., :step], total[..., step:] + factor[:, step:] * total[..., :-step]], -1)
        factor = torch.cat([factor[:, :step], factor[:, step:] * factor[:, :-step]], -1)
        step *= 2
    return total


def mixture_cross_entropy(
    cross_entropy: Callable[..., tuple[Tensor, Tensor]],
    hidden: Tensor,
    targets: Tensor,
    begins: Tensor,
    log_prior: Tensor,
    share: float,
    columns: slice | Tensor = slice(None),
    whole_rows: Callable[[Tensor], Tensor] = lambda losses: losses,
) -> tuple[Tensor, Mixed]:
    """Cross-entropy of the mixture, summed over the targets, in nats; it carries all gradients. And the mixture of whole rows,
    without any.

    Args: `cross_entropy`: `linear_cross_entropy` with the output projection of all members as its weight; `hidden`
    [N B, T, D]: each member's, for the same rows; `targets` int64 [B, T], `IGNORED` where a token does not count; `begins` bool
    [B, T], `log_prior`, `share`: as in `mix`. Where a process has only some `columns` of the rows, `begins` is of whole rows, and
    `whole_rows` makes [N, B, T] of all processes of [N, B, t].

    The logits of all tokens never exist at a time: what each token's likelihood is worth follows from the likelihoods alone,
    and with these weights the gradient is that of a weighted cross-entropy, made chunk by chunk. That projects twice.
    """
    members = len(hidden) // len(targets)
    repeated = targets.repeat(members, 1)
    with torch.no_grad():
        losses = cross_entropy(hidden, targets=repeated)[1].unflatten(0, (members, -1))
    likelihoods = (-whole_rows(losses)).double().requires_grad_(torch.is_grad_enabled())
    mixed = mix(likelihoods, begins, log_prior.double(), share)
    total = -(mixed.log_likelihoods[:, columns] * (targets != IGNORED)).sum()
    if torch.is_grad_enabled():
        (worth,) = torch.autograd.grad(mixed.log_likelihoods.sum(), likelihoods, retain_graph=True)
        weights = worth[..., columns].flatten(0, 1).to(losses.dtype)
        weighted, _ = cross_entropy(hidden, targets=repeated, target_weights=weights)
        total = total + (weighted - weighted.detach())
    return total, Mixed(*(part.detach() for part in mixed))
