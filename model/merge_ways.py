"""The ways in which several adapters become one, by the names of PEFT's `add_weighted_adapter`; without torch, for commands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

MERGED = "merged"
"""Name of the adapter that several become."""


class Way(NamedTuple):
    """How tensors of several adapters become one."""

    of: Literal["factors", "updates", "ranks"]
    """factors: the A's and the B's, each by themselves; updates: the products B A, which are then cut down to a rank by SVD;
    ranks: the factors beside each other, so that the updates are summed exactly."""
    prune: Literal["magnitude", "random"] | None = None
    """Which elements are set to 0 before: the smallest, or any, the others being enlarged to keep the expectation (DARE, Yu et
    al. 2024)."""
    elects: bool = False
    """Only elements of the sign that most have are averaged (TIES, Yadav et al. 2023); else all are summed."""


WAYS = {
    "linear": Way("factors"),
    "cat": Way("ranks"),
    "svd": Way("updates"),
    "ties": Way("factors", "magnitude", True),
    "ties_svd": Way("updates", "magnitude", True),
    "dare_linear": Way("factors", "random"),
    "dare_linear_svd": Way("updates", "random"),
    "dare_ties": Way("factors", "random", True),
    "dare_ties_svd": Way("updates", "random", True),
    "magnitude_prune": Way("factors", "magnitude"),
    "magnitude_prune_svd": Way("updates", "magnitude"),
}
"""By PEFT's names."""


def equal_shares(names: Sequence[str], way: str) -> dict[str, float]:
    """Those of a mean: 1 / N, or 1 where the way averages by itself."""
    return dict.fromkeys(names, 1.0 if WAYS[way].elects else 1 / len(names))


class Choice(NamedTuple):
    """What ways leave open."""

    density: float = 0.5
    """Share of the elements that pruning keeps."""
    rank: int | None = None
    """Of what an SVD makes; None: the largest of the adapters'."""
    majority_sign: Literal["total", "frequency"] = "total"
    """Signs are counted by magnitude, or each once."""
    seed: int = 0
    """Of random pruning."""
