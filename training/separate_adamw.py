"""AdamW for parts of a model that are trained beside each other as if each was alone."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def whole(holder: Tensor) -> list[slice]:
    """All elements of a parameter."""
    return [slice(0, holder.numel())]


class SeparateAdamW(torch.optim.AdamW):
    """AdamW whose groups are clipped each by its own norm, and are left as they are by a step that had nothing for them.

    Of a group with the key "targets" a step has something if that number is not 0; moments, decay and the count of steps wait
    otherwise. The parameters may be whole, or what ZeRO makes of them: then `place` has to be called before the first step.
    """

    def __init__(self, groups: list[dict[str, Any]], max_norm: float, **options: Any) -> None:
        """`max_norm`: of the gradient of a group; 0: it is not clipped."""
        super().__init__(groups, fused=True, **options)
        self.max_norm = max_norm
        self.counted: Callable[[Tensor], Sequence[slice]] = whole
        self.sum_over_ranks: Callable[[Tensor], Tensor] = lambda square: square

    def place(self, counted: Callable[[Tensor], Sequence[slice]], sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """`counted`: which elements of a flattened parameter no other rank counts; `sum_over_ranks`: of one number, float64."""
        self.counted, self.sum_over_ranks = counted, sum_over_ranks

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody has one
        """Of the groups that are there: ZeRO steps one after the other."""
        groups = self.param_groups
        try:
            for group in groups:
                holders = [holder for holder in group["params"] if holder.grad is not None]
                if holders and group.get("targets", 1):
                    self._clip(holders)
                    self.param_groups = [group]
                    super().step(closure)
        finally:
            self.param_groups = groups

    def _clip(self, holders: list[Tensor]) -> None:
        if not self.max_norm:
            return
        gradients = [(holder, holder.grad) for holder in holders if holder.grad is not None]
        parts = [gradient.view(-1)[part] for holder, gradient in gradients for part in self.counted(holder)]
        norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]
        square = torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64)
        scale = (self.max_norm / (self.sum_over_ranks(square).sqrt() + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([gradient for _, gradient in gradients], float(scale))
