"""Whether a step is applied, asked when its loss and its gradient are known and nothing has been updated yet."""

from collections.abc import Callable

import torch
from torch import Tensor

from engine.optimizer import Guarded
from engine.reduction.compression import CompressedReduction

Judge = Callable[[float, float], bool]
"""Of the mean loss and the norm of the whole gradient of a step: whether it is to be refused. The same on all ranks."""


class Gate:
    """In front of an optimizer that DeepSpeed steps, whole or group by group, after it has measured the gradient.

    A refused step leaves weights, moments, counts of steps and residuals as they were: the optimizer finds no gradients.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, norm: Callable[[], float], reduction: CompressedReduction | None
    ) -> None:
        """`norm`: of the whole gradient, once an optimizer of DeepSpeed has measured it."""
        self._norm, self._reduction = norm, reduction
        self._judge: Callable[[float], bool] | None = None
        self._verdict: bool | None = None
        self._taken: list[tuple[Tensor, Tensor]] = []
        if isinstance(optimizer, Guarded):
            optimizer.refuses = self._refuses
        else:
            optimizer.register_step_pre_hook(self._take_gradients)
            optimizer.register_step_post_hook(self._give_back)

    def expect(self, judge: Callable[[float], bool] | None) -> None:
        """Before the passes of a step: who judges it by its norm; None: nobody."""
        self._judge, self._verdict = judge, None
        if self._reduction:
            self._reduction.keep(judge is not None)

    @property
    def refused(self) -> bool:
        """Whether the last step was."""
        return self._verdict is True

    def _refuses(self, norm: float) -> bool:
        if self._verdict is None and self._judge:
            self._verdict = self._judge(norm)
            if self._verdict and self._reduction:
                self._reduction.go_back()
        return self.refused

    def _take_gradients(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self._judge and self._refuses(self._norm()):
            holders = [holder for group in optimizer.param_groups for holder in group["params"]]
            self._taken = [(holder, holder.grad) for holder in holders if holder.grad is not None]
            for holder, _gradient in self._taken:
                holder.grad = None

    def _give_back(self, *_: object) -> None:
        for holder, gradient in self._taken:  # DeepSpeed keeps some of them from step to step
            holder.grad = gradient
        self._taken = []
