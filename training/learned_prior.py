"""The prior of a mixture as a few numbers that every rank learns alike. Legend: P sources, N adapters."""

import torch
from torch import Tensor

from training.config import Recipe
from training.state import PriorState


class LearnedPrior:
    """Adam (Kingma and Ba 2015) on a prior's logits in float64, with gradients that are summed over all ranks."""

    def __init__(self, logits: Tensor, recipe: Recipe) -> None:
        """`logits` [P, N], which are changed in place."""
        assert recipe.adapters.prior_lr is not None
        self._ratio = recipe.adapters.prior_lr / recipe.optimizer.lr
        self._logits, self._betas, self._eps = logits, recipe.optimizer.betas, recipe.optimizer.eps
        self._moments, self._step = torch.zeros(2, *logits.shape, dtype=torch.float64), 0

    @property
    def size(self) -> int:
        """Numbers in it, P N."""
        return self._logits.numel()

    def step(self, gradient: list[float], targets: int, learning_rate: float) -> None:
        """`gradient` of the loss of so many targets, P N numbers; `learning_rate` of the adapters in this step."""
        found = torch.tensor(gradient, dtype=torch.float64).view_as(self._logits) / max(targets, 1)
        self._step += 1
        for moment, beta, sample in zip(self._moments, self._betas, (found, found.square()), strict=True):
            moment.lerp_(sample, 1 - beta)
        mean, square = (
            moment / (1 - beta**self._step) for moment, beta in zip(self._moments, self._betas, strict=True)
        )
        self._logits -= self._ratio * learning_rate * mean / (square.sqrt() + self._eps)

    @property
    def state(self) -> PriorState:
        mean, square = self._moments.tolist()
        return PriorState(logits=self._logits.tolist(), exp_avg=mean, exp_avg_sq=square, step=self._step)

    def restore(self, state: PriorState) -> None:
        self._logits.copy_(_float64(state.logits))
        self._moments.copy_(torch.stack([_float64(state.exp_avg), _float64(state.exp_avg_sq)]))
        self._step = state.step


def _float64(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)
