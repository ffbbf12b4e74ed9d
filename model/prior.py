"""What a mixture of adapters thinks of them before a document has said anything. Legend: P sources, N adapters, B rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .adapter_config import AdaptersConfig


class Prior:
    """One for all documents, or one for those of each source; where a row's source has none, the mean of all."""

    def __init__(self, adapters: AdaptersConfig) -> None:
        self.learned = adapters.prior_lr is not None
        self.logits = torch.tensor(adapters.prior_table, dtype=torch.float64, device="cpu").log()
        """[P, N] or, of all, [1, N]."""
        self._named = adapters.prior_sources
        self._places = torch.zeros(0, dtype=torch.int64, device="cpu")

    @property
    def table(self) -> list[list[float]]:
        """As `AdaptersConfig.prior_table`."""
        return self.logits.softmax(-1).tolist()

    def know(self, sources: Sequence[str]) -> None:
        """By which names rows give the places of their sources."""
        places = [self._named.index(name) if name in self._named else len(self._named) for name in sources]
        self._places = torch.tensor(places, dtype=torch.int64, device="cpu")

    def log(self, logits: Tensor, sources: Tensor | None) -> Tensor:
        """Normalised, [N, B] or, of all rows, [N, 1]. `logits`: mine, wherever they are; `sources` int64 [B]: of rows."""
        table = logits.log_softmax(-1)
        if not self._named:
            return table.T
        with_mean = torch.cat([table, table.exp().mean(0, keepdim=True).log()])
        return with_mean[-1:].T if sources is None else with_mean[self._places.to(sources.device)[sources]].T
