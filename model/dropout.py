"""Dropout that depends on nothing but the row, the token's place in it, the map and the feature: the same in every layout.

A mask is a hash of these, made anew wherever it is needed: nothing is kept or sent. Legend: B rows, T tokens, D features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .documents import Documents


def dropped(x: Tensor, documents: Documents, share: float, place: int, first: int = 0) -> Tensor:
    """`x` [B, T, D] with `share` of its numbers 0 and the others larger, so that their mean stays (Srivastava et al. 2014).

    `documents`: with the seeds of the rows; without any, nothing is dropped. `place`: of the map that reads `x` in the model;
    `first`: place of the first of the features that are here.
    """
    if documents.seeds is None or not share:
        return x
    tokens = sum(documents.lengths) // len(documents.seeds)
    columns = torch.arange(tokens, device=x.device)[documents.columns]
    features = torch.arange(first, first + x.shape[-1], device=x.device)
    of_tokens = _mixed(documents.seeds[:, None] + _mixed(columns))
    of_features = _mixed(features + (place + 1) * 2**32)
    bits = _mixed_again(of_tokens[..., None].int() ^ of_features.int())
    kept = (bits & 0x7FFFFFFF) >= int(share * 2**31)
    return x * kept / (1 - share)


def _mixed(x: Tensor) -> Tensor:
    """Each int64 as another (the finalizer of splitmix64, Steele et al. 2014), as much of it as fits in 63 bits."""
    x = (x ^ (x >> 30)) * -0x40A7B892E31B1A47
    x = (x ^ (x >> 27)) * -0x6B2FB644ECCEEE15
    return x ^ (x >> 31)


def _mixed_again(x: Tensor) -> Tensor:
    """Each int32 as another (the finalizer of MurmurHash3, Appleby 2011)."""
    x = (x ^ (x >> 16)) * -0x7A143595
    x = (x ^ (x >> 13)) * -0x3D4D51CB
    return x ^ (x >> 16)
