"""The contrastive loss of pairs of texts: a query has to be nearer to its document than to those of all other pairs.

InfoNCE (van den Oord et al. 2018, Representation Learning with Contrastive Predictive Coding, equation 4) over cosines, with
the documents of the whole batch as negatives (Karpukhin et al. 2020, Dense Passage Retrieval, section 3.2).

Legend: B rows, T tokens of a row, D model, n pairs that are here, N pairs in all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 0.05


class Contrast(NamedTuple):
    temperature: float
    """Cosines are divided by it."""
    of_all: Callable[[Tensor], tuple[Tensor, int]] = lambda vectors: (vectors, 0)
    """From the vectors [n, D] of the pairs here to those of all pairs [N, D], and the place of the first one here."""

    def __call__(self, x: Tensor, sides: Tensor) -> Tensor:
        """Of each pair [n], in nats. `x` [B, T, D]: what the head sees; `sides` int64 [B, T]: of pair i of a row 2 i at
        the tokens of its query, 2 i + 1 at those of its document, negative elsewhere."""
        vectors = pooled(x, sides).unflatten(0, (-1, 2))
        documents, first = self.of_all(vectors[:, 1])
        cosines = vectors[:, 0] @ documents.T
        places = torch.arange(first, first + len(vectors), device=x.device)
        return F.cross_entropy(cosines / self.temperature, places, reduction="none")


def pooled(x: Tensor, sides: Tensor) -> Tensor:
    """The means of `x` [B, T, D] over the tokens of each side, all sides of a row behind one another, float32 of length 1."""
    of_rows = sides.amax(1).clamp(min=-1) + 1
    places, counted = sides + (of_rows.cumsum(0) - of_rows)[:, None], sides >= 0
    total = x.new_zeros(int(of_rows.sum()), x.shape[-1], dtype=torch.float32)
    return F.normalize(total.index_add(0, places[counted], x[counted].float()), dim=-1)
