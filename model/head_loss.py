"""What a head makes of its activations and the targets: one model's cross-entropy, or that of the mixture of all adapters.

Legend: N adapters, B batch, T tokens of a row, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .adapter_config import AdaptersConfig
from .contrast import Contrast
from .documents import Documents
from .loss import IGNORED, reported_sums
from .mixture import Mixed, mixture_cross_entropy
from .prior import Prior


class HeadLoss:
    """The loss of a model with these adapters, or none."""

    def __init__(self, adapters: AdaptersConfig) -> None:
        self.adapters, self.prior = adapters, Prior(adapters)
        self.sources: tuple[str, ...] = ()
        """Names of what rows come from, by the places that `Documents.sources` has."""
        self.contrast: Contrast | None = None
        """Of pairs of texts, where these are what is trained on."""
        self.of_documents = False
        """Whether losses and targets of each document, or pair of texts, are asked for, instead of sums over all."""
        self.sources_apart = 0
        """Of how many sources losses and targets are asked for beside the sums, of a plain model whose rows say their source."""
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
        `reported_sums` of the rows of each adapter, or under the mixture the responsibilities of each, for every source by
        itself. A learned prior's gradient follows, as long as there are gradients. In mode hard, which mixes whole documents
        before it chooses, the places of their best adapters come after sources taken together, [1 + N + documents]. With
        `sources_apart` the sums of `sums_of_sources` come last.

        `cross_entropy`: `linear_cross_entropy` without its weight; `x` [B, T, D], under the mixture [N B, T, D].
        """
        if self.contrast is not None:
            losses = self.contrast(x, targets)
            return losses.sum(), self._of_pairs(losses.detach().double())
        if self.of_documents:
            assert documents is not None
            losses = self.of_tokens(cross_entropy, x, documents, targets)
            return losses.sum(), sums_of_documents(losses, targets, documents)
        if documents is not None and documents.spread is not None:
            return self._of_mixture(cross_entropy, x, documents, targets)
        objective, losses = cross_entropy(
            x, targets=targets, z_loss_weight=z_loss_weight, target_weights=target_weights
        )
        routing = None if documents is None else documents.routing
        sums = reported_sums(losses, target_weights, routing, len(self.adapters.names))
        if self.sources_apart:
            assert documents is not None
            assert documents.sources is not None
            sums = torch.cat([sums, sums_of_sources(losses, targets, documents.sources, self.sources_apart)])
        return objective, sums

    def of_tokens(
        self, cross_entropy: Callable[..., tuple[Tensor, Tensor]], x: Tensor, documents: Documents, targets: Tensor
    ) -> Tensor:
        """-log p of each of the targets [B, T], 0 where there is none, without gradients."""
        if documents.spread is None:
            return cross_entropy(x, targets=targets)[1]
        return -self._mixed(cross_entropy, x, documents, targets, self.prior.logits)[1].log_likelihoods

    @property
    def num_sums(self) -> int:
        """Of a forward pass with gradients."""
        adapters, of_prior = len(self.adapters.names), self.prior.logits.numel() if self.prior.learned else 0
        return 1 + adapters * (max(len(self.sources), 1) if self.adapters.mode == "mixture" else 1) + of_prior

    def know(self, sources: Sequence[str]) -> None:
        """Names of what the data's rows come from."""
        self.sources = tuple(sources)
        self.prior.know(sources)

    def _of_pairs(self, losses: Tensor) -> Tensor:
        """As `__call__` and, for documents, `sums_of_documents` have them."""
        if self.of_documents:
            return torch.cat([losses, torch.ones_like(losses)])
        return torch.cat([losses.sum()[None], losses.new_zeros(self.num_sums - 1)])

    def _of_mixture(
        self, cross_entropy: Callable[..., tuple[Tensor, Tensor]], x: Tensor, documents: Documents, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        learns = self.prior.learned and torch.is_grad_enabled()
        logits = self.prior.logits.to(x.device).detach().requires_grad_(learns)
        total, mixed = self._mixed(cross_entropy, x, documents, targets, logits)
        counted = (targets != IGNORED).double()
        of_rows = (mixed.log_responsibilities[..., documents.columns].exp() * counted).sum(2)
        sums = [total.detach()[None]]
        if self.adapters.mode == "hard":
            last = documents.cu_seqlens[1:].long() - 1
            return total, torch.cat([*sums, of_rows.sum(1), mixed.log_responsibilities.flatten(1)[:, last].argmax(0)])
        by_source = of_rows.new_zeros(max(len(self.sources), 1), len(of_rows))
        places = torch.zeros_like(targets[:, 0]) if documents.sources is None else documents.sources
        sums.append(by_source.index_add(0, places, of_rows.T).flatten())
        if learns:
            sums.append(torch.autograd.grad(total, logits, retain_graph=True)[0].flatten())
        return total, torch.cat(sums)

    def _mixed(
        self,
        cross_entropy: Callable[..., tuple[Tensor, Tensor]],
        x: Tensor,
        documents: Documents,
        targets: Tensor,
        logits: Tensor,
    ) -> tuple[Tensor, Mixed]:
        return mixture_cross_entropy(
            cross_entropy,
            x,
            targets,
            documents.begins,
            self.prior.log(logits.to(x.device), documents.sources),
            self.adapters.evidence,
            documents.columns,
            lambda losses: self.whole_rows(losses, documents),
        )


def sums_of_sources(losses: Tensor, targets: Tensor, places: Tensor, sources: int) -> Tensor:
    """float64 [2 * sources]: first the sums of the losses [B, t], then the numbers of targets. `places` int64 [B]: by row."""
    of_rows = torch.stack([losses.sum(1, dtype=torch.float64), (targets != IGNORED).sum(1, dtype=torch.float64)])
    return of_rows.new_zeros(2, sources).index_add_(1, places, of_rows).flatten()


def sums_of_documents(losses: Tensor, targets: Tensor, documents: Documents) -> Tensor:
    """float64 [2 * documents]: first the sums of the losses [B, t] of the tokens that are here, then the numbers of targets."""
    of_rows = documents.tokens().document.view(len(targets), -1)
    place = of_rows[:, documents.columns].flatten()
    sums = losses.new_zeros(2, len(documents.lengths), dtype=torch.float64)
    sums[0].index_add_(0, place, losses.double().flatten())
    sums[1].index_add_(0, place, (targets != IGNORED).double().flatten())
    return sums.flatten()
