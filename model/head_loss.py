"""What a head makes of its activations and the targets: one model's cross-entropy, or that of the mixture of all adapters.

Legend: N adapters, B batch, T tokens of a row, D model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .adapter_config import AdaptersConfig
from .documents import Documents
from .loss import IGNORED, reported_sums
from .mixture import Mixed, mixture_cross_entropy


class HeadLoss:
    """The loss of a model with these adapters, or none."""

    def __init__(self, adapters: AdaptersConfig) -> None:
        self.adapters = adapters
        self.whole_rows: Callable[[Tensor, Documents], Tensor] = lambda losses, documents: losses
        """Of the losses [N, B, t] of the tokens that are here, where other processes have the rest of the rows: [N, B, T]."""

    def __call__(
        self,
        cross_entropy: Callable[..., tuple[Tensor, Tensor]],
        x: Tensor,
        documents: Documents | None,
        targets: Tensor,
        z_loss_weight: float,
        target_weights: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The objective, which carries the gradient, and float64 sums [1 + N] over the targets [B, T]: the cross-entropy, and
        `reported_sums` of the rows of each adapter, or under the mixture the responsibilities of each. In mode hard, which mixes
        whole documents before it chooses, the places of their best adapters follow, [1 + N + documents].

        `cross_entropy`: `linear_cross_entropy` without its weight; `x` [B, T, D], under the mixture [N B, T, D].
        """
        if documents is not None and documents.spread is not None:
            return self._of_mixture(cross_entropy, x, documents, targets)
        objective, losses = cross_entropy(
            x, targets=targets, z_loss_weight=z_loss_weight, target_weights=target_weights
        )
        routing = None if documents is None else documents.routing
        return objective, reported_sums(losses, target_weights, routing, len(self.adapters.names))

    def of_tokens(
        self, cross_entropy: Callable[..., tuple[Tensor, Tensor]], x: Tensor, documents: Documents, targets: Tensor
    ) -> Tensor:
        """-log p of each of the targets [B, T], 0 where there is none, without gradients."""
        if documents.spread is None:
            return cross_entropy(x, targets=targets)[1]
        return -self._mixed(cross_entropy, x, documents, targets)[1].log_likelihoods

    def _of_mixture(
        self, cross_entropy: Callable[..., tuple[Tensor, Tensor]], x: Tensor, documents: Documents, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        total, mixed = self._mixed(cross_entropy, x, documents, targets)
        counted = (targets != IGNORED).double()
        responsibilities = (mixed.log_responsibilities[..., documents.columns].exp() * counted).sum((1, 2))
        sums = [total.detach()[None], responsibilities]
        if self.adapters.mode == "hard":
            last = documents.cu_seqlens[1:].long() - 1
            sums.append(mixed.log_responsibilities.flatten(1)[:, last].argmax(0))
        return total, torch.cat(sums)

    def _mixed(
        self, cross_entropy: Callable[..., tuple[Tensor, Tensor]], x: Tensor, documents: Documents, targets: Tensor
    ) -> tuple[Tensor, Mixed]:
        prior = torch.tensor(self.adapters.prior_shares, dtype=torch.float64, device=x.device)
        return mixture_cross_entropy(
            cross_entropy,
            x,
            targets,
            documents.begins,
            prior.log(),
            self.adapters.evidence,
            documents.columns,
            lambda losses: self.whole_rows(losses, documents),
        )
