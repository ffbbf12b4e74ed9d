"""Groups of SeparateAdamW are trained as if each was alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.properties import examples
from training.separate_adamw import SeparateAdamW

OPTIONS = {"lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}


def parameters(group: int) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(group)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 2), (5,))]


def gradients(group: int, step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * group + step)
    return [torch.randn(shape, generator=generator) * 10 ** (group - 1) for shape in ((3, 2), (5,))]


@examples(30)
@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=5), st.sampled_from([0.0, 0.5]))
def test_each_group_sees_only_its_own_steps(steps, max_norm):
    """`steps`: for each step which of three groups it has something for."""
    groups = [{"params": parameters(group), "weight_decay": 0.1} for group in range(3)]
    together = SeparateAdamW(groups, max_norm, **OPTIONS)
    alone = [torch.optim.AdamW(parameters(group), **OPTIONS, weight_decay=0.1) for group in range(3)]
    for number, step in enumerate(steps):
        for group, busy in enumerate(step):
            together.param_groups[group]["targets"] = 7 * busy
            for parameter, gradient in zip(
                together.param_groups[group]["params"], gradients(group, number), strict=True
            ):
                parameter.grad = gradient.clone() * busy
            if busy:
                own = alone[group].param_groups[0]["params"]
                for parameter, gradient in zip(own, gradients(group, number), strict=True):
                    parameter.grad = gradient
                if max_norm:
                    torch.nn.utils.clip_grad_norm_(own, max_norm)
                alone[group].step()
        together.step()
    for group, optimizer in enumerate(alone):
        for mine, theirs in zip(
            together.param_groups[group]["params"], optimizer.param_groups[0]["params"], strict=True
        ):
            torch.testing.assert_close(mine, theirs)


def test_the_norm_counts_what_this_rank_is_told_to_and_what_others_found():
    group = {"params": [torch.nn.Parameter(torch.zeros(4))]}
    optimizer = SeparateAdamW([group], 1.0, **OPTIONS)
    holder = group["params"][0]
    holder.grad = torch.tensor([3.0, 100.0, 0.0, 0.0])
    optimizer.place(lambda _: [slice(0, 1), slice(2, 4)], lambda square: square + 16)
    optimizer.step()
    torch.testing.assert_close(holder.grad, torch.tensor([3.0, 100.0, 0, 0]) / 5)  # root of 9 + 16


def test_groups_are_all_there_after_an_error():
    groups = [{"params": parameters(group)} for group in range(2)]
    optimizer = SeparateAdamW(groups, 1.0, **OPTIONS)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)

    def fail(_: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("a rank is gone")

    optimizer.place(lambda holder: [slice(0, holder.numel())], fail)
    with pytest.raises(RuntimeError, match="a rank is gone"):
        optimizer.step()
    assert len(optimizer.param_groups) == 2
