"""Which dimension of which parameter tensor parallelism cuts, derived from the layer plan; how to cut and to join.

A linear map into heads or into the feed-forward width is cut by its outputs, the one that leads back by its inputs, so each
rank computes its heads and its part of that width from start to end (Shoeybi et al. 2019, section 3). Embedding and output
head are cut by vocabulary. Norms, and biases added after the sum over ranks, are whole on every rank.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from model.adapter_config import FACTORS
from model.config import ModelConfig
from model.llama import Attention, Embedding, FeedForward, Head, layer_plan

BY_OUTPUTS = "weight", "bias", "lora_B"
CUTS = {
    Embedding: {"weight": 0},
    Attention: {
        **{f"{name}_proj.{kind}": 0 for name in "qkv" for kind in BY_OUTPUTS},
        **dict.fromkeys(("o_proj.weight", "o_proj.lora_A"), 1),
    },
    FeedForward: {
        **{f"{name}_proj.{kind}": 0 for name in ("gate", "up") for kind in BY_OUTPUTS},
        **dict.fromkeys(("down_proj.weight", "down_proj.lora_A"), 1),
    },
    Head: {"weight": 0},
}
"""Of each kind of module: the parameters that are cut, and along which dimension; of adapters' factors the beginnings."""


def cut_dimensions(config: ModelConfig) -> dict[str, int | None]:
    """Every parameter of the plan by name, a tied head's too: the dimension along which it is cut; None: not at all."""
    dimensions: dict[str, int | None] = {}
    with torch.device("meta"):
        for entry in layer_plan(config):
            layer = entry.build(seed=0)
            inside = cuts_of_layer(layer)
            found = {name: inside.get(name) for name, _ in layer.named_parameters()}
            if entry.tied_to:  # it owns no weight
                found = dict(CUTS[entry.cls])
            dimensions |= {f"{entry.name}.{name}": cut for name, cut in found.items()}
    return dimensions


def cuts_of_layer(layer: nn.Module) -> dict[str, int]:
    """Names of the parameters that are cut in a layer of the plan, each with the dimension."""
    return {
        f"{path}.{name}".lstrip("."): dimension
        for path, module in layer.named_modules()
        for name, dimension in cuts_of(module)
    }


def cuts_of(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Names of the parameters inside a module that are cut as it says, each with the dimension."""
    cuts = CUTS.get(type(module), {})
    for name, _ in module.named_parameters():
        factor = next((begin for begin in FACTORS if begin in name), None)
        key = name if factor is None else name[: name.index(factor)] + factor.removesuffix("_")
        if key in cuts:
            yield name, cuts[key]


def slice_of(whole: Tensor, dimension: int | None, rank: int, ranks: int) -> Tensor:
    """The part of a parameter that one rank of a tensor-parallel group holds; a view. The first parts may be 1 longer."""
    return whole if dimension is None else whole.tensor_split(ranks, dimension)[rank]


def first_of_slice(size: int, rank: int, ranks: int) -> int:
    """Where in a dimension of this size the part of a rank begins (see `slice_of`)."""
    return size // ranks * rank + min(rank, size % ranks)


def join(parts: list[Tensor], dimension: int | None) -> Tensor:
    """The whole parameter from the parts of all ranks; what is not cut is the first rank's."""
    return parts[0] if dimension is None or len(parts) == 1 else torch.cat(parts, dimension)
