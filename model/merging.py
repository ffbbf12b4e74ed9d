"""Several adapters made one, in the ways of PEFT's `add_weighted_adapter`, and adapters made part of the matrices they are for.

Legend: N adapters, r rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .adapter_config import FACTORS, AdaptersConfig
from .merge_ways import MERGED, WAYS, Choice, Way


def combined(
    adapters: AdaptersConfig,
    state: Mapping[str, Tensor],
    way: str,
    shares: Mapping[str, float | Tensor],
    choice: Choice | None = None,
) -> tuple[AdaptersConfig, dict[str, Tensor]]:
    """One adapter, `MERGED`, made of those that `shares` names; its config and its parameters by their names in a `Llama`.

    `state`: the parameters of all; sums are made in float32, or float64 where they are. `shares`: what each counts; under `cat`
    also a tensor [adapted layers], through which gradients flow. `way`: of `WAYS`. Raises ValueError where their ranks differ,
    but `factors` are summed.
    """
    kind, choice, names = WAYS[way], choice or Choice(), list(shares)
    if kind.of == "factors" and len({adapters.rank(name) for name in names}) > 1:
        raise ValueError(
            f"adapters whose ranks differ have no sum of factors, as {way} makes it: use cat or a way with svd"
        )
    generator = torch.Generator().manual_seed(choice.seed)
    rank = choice.rank or max(adapters.rank(name) for name in names)
    merged_state: dict[str, Tensor] = {}
    modules = dict.fromkeys(name.rpartition(".lora_")[0] for name in state)
    layers = list(dict.fromkeys(module.split(".")[1] for module in modules))
    for module in modules:
        a, b = ([_wide(state[f"{module}.{begin}{name}"]) for name in names] for begin in FACTORS)
        of_layer = [_at(shares[name], layers.index(module.split(".")[1])) * adapters.scaling(name) for name in names]
        if kind.of == "ranks":
            made = torch.cat([x * share for x, share in zip(a, of_layer, strict=True)]), torch.cat(b, 1)
        elif kind.of == "updates":
            products = [y @ x * adapters.scaling(name) for x, y, name in zip(a, b, names, strict=True)]
            made = _cut_down(
                _task_sum(products, [float(shares[name]) for name in names], kind, choice, generator), rank
            )
        else:
            weights = [float(share) for share in of_layer]
            roots = [abs(weight) ** 0.5 for weight in weights]
            signed = [root if weight >= 0 else -root for root, weight in zip(roots, weights, strict=True)]
            made = _task_sum(a, signed, kind, choice, generator), _task_sum(b, roots, kind, choice, generator)
        for begin, factor in zip(FACTORS, made, strict=True):
            merged_state[f"{module}.{begin}{MERGED}"] = factor
    r = len(made[0])
    update = {"names": (MERGED,), "mode": "single", "r": r, "lora_alpha": float(r), "use_rslora": False}
    update |= {"prior": {}, "prior_lr": None, "evidence": 1.0, "initial_weights": {}}
    return adapters.model_copy(update=update), merged_state


def _at(share: float | Tensor, layer: int) -> float | Tensor:
    return share[layer] if isinstance(share, Tensor) and share.dim() else share


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _task_sum(
    tensors: Sequence[Tensor], weights: Sequence[float], kind: Way, choice: Choice, generator: torch.Generator
) -> Tensor:
    """Pruned, weighted, and summed or averaged among those of the elected sign."""
    stacked = torch.stack([_pruned(tensor, kind, choice.density, generator) for tensor in tensors])
    weighted = stacked * torch.tensor(weights, dtype=stacked.dtype, device=stacked.device).view(
        -1, *[1] * tensors[0].dim()
    )
    if not kind.elects:
        return weighted.sum(0)
    votes = stacked if choice.majority_sign == "total" else stacked.sign()
    agrees = stacked.sign() == torch.where(votes.sum(0) >= 0, 1, -1)
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _pruned(tensor: Tensor, kind: Way, density: float, generator: torch.Generator) -> Tensor:
    if kind.prune is None or density >= 1:
        return tensor
    if kind.prune == "random":
        kept = torch.bernoulli(torch.full(tensor.shape, density, dtype=tensor.dtype), generator=generator)
        return tensor * kept.to(tensor.device) / density
    kept = torch.zeros_like(tensor).flatten()
    kept[tensor.abs().flatten().topk(int(density * tensor.numel())).indices] = 1
    return tensor * kept.view_as(tensor)


def _cut_down(update: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors A [rank, inputs] and B [outputs, rank] whose product is nearest to an update [outputs, inputs]."""
    u, s, v = torch.linalg.svd(update, full_matrices=False)
    a, b = update.new_zeros(rank, update.shape[1]), update.new_zeros(update.shape[0], rank)
    a[: len(s)], b[:, : len(s)] = v[:rank], (u * s)[:, :rank]
    return a, b


def merged(
    base: Iterable[tuple[str, Tensor]],
    adapters: AdaptersConfig,
    state: Mapping[str, Tensor],
    shares: Mapping[str, float],
) -> Iterator[tuple[str, Tensor]]:
    """The weights of a model without adapters that computes what `base` does with the adapters of `shares` added up: W + sum of
    share_i * scaling_i * B_i A_i.

    `state`: the adapters' parameters by their names in a `Llama`. Sums are made in float32, or float64 where the base is.
    """
    for name, tensor in base:
        module = name.removesuffix(".weight")
        for adapter, share in shares.items():
            if (a := state.get(f"{module}.lora_A_{adapter}")) is not None:
                wide = torch.promote_types(tensor.dtype, torch.float32)
                b = state[f"{module}.lora_B_{adapter}"]
                tensor = tensor.to(wide).addmm(b.to(wide), a.to(wide), alpha=share * adapters.scaling(adapter))
        yield name, tensor
