"""Several low-rank adapters on one base: W x + scaling_i B_i A_i x, where i is the adapter that a token has (Hu et al. 2022).

Rows of several adapters are multiplied at once: tokens in blocks of one adapter each, the factors of every block beside them,
one batched product. Ranks that differ are filled up with zeros.

Legend: N adapters, B batch, T tokens of a row, n blocks of b tokens, r rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .adapter_config import FACTORS, PROJECTIONS, AdaptersConfig
from .documents import Documents
from .dropout import dropped
from .seeded import Linear, Seed

BLOCK_TOKENS = 64
"""Tokens that are multiplied by one adapter's factors at a time where rows have several."""


class AdapterBlocks(NamedTuple):
    """Tokens whose adapters differ inside of rows, brought together in blocks of one adapter each."""

    adapters: Tensor
    """int64 [n]: of each block."""
    tokens: Tensor
    """int64 [n b]: places in the flattened rows; where an adapter's tokens do not fill its last block, the first token's."""
    places: Tensor
    """int64 [B T]: where in the blocks each token is."""

    @classmethod
    def of(cls, routing: Tensor, adapters: int) -> AdapterBlocks:
        """`routing` int64 [B, T]: the adapter of each token."""
        flat = routing.flatten()
        order, counts = flat.argsort(stable=True), flat.bincount(minlength=adapters)
        blocks = -(-counts // BLOCK_TOKENS)
        shift = (blocks * BLOCK_TOKENS - counts).cumsum(0) - (
            blocks * BLOCK_TOKENS - counts
        )  # of what is filled up before
        at = torch.arange(len(flat), device=flat.device) + shift[flat[order]]
        tokens = flat.new_zeros(int(blocks.sum()) * BLOCK_TOKENS)
        tokens[at] = order
        places = torch.empty_like(flat)
        places[order] = at
        return cls(torch.arange(adapters, device=flat.device).repeat_interleave(blocks), tokens, places)

    def together(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [n, b, D]."""
        return x.flatten(0, 1).index_select(0, self.tokens).unflatten(0, (-1, BLOCK_TOKENS))

    def apart(self, x: Tensor, shape: torch.Size) -> Tensor:
        """[n, b, D] -> [B, T, D], which is `shape`."""
        return x.flatten(0, 1).index_select(0, self.places).view(shape)


class AdaptedLinear(Linear):
    """A linear map of the base and its adapters; without a routing it is the base's."""

    def __init__(self, base: Linear, adapters: AdaptersConfig, seed: Seed, name: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias, self.names = base.weight, base.bias, adapters.names
        ranks = [adapters.rank(each) for each in self.names]
        self.scalings = [adapters.scaling(each) for each in self.names]
        self.dropout = adapters.lora_dropout
        self.place = len(PROJECTIONS) * seed.layer + PROJECTIONS.index(name.rpartition(".")[2])
        self.first_input = 0
        """Place of the first of the inputs that are here."""
        self.of_all: dict[str, Callable[[Tensor], Tensor]] = {}
        """By beginning of the name: what is done to factors of which other ranks have the same, with other gradients."""
        for each, rank in zip(self.names, ranks, strict=True):
            like: dict[str, Any] = {"dtype": self.weight.dtype, "device": self.weight.device}
            a = nn.Parameter(torch.empty(rank, self.in_features, **like))
            seed.uniform_(a, f"{name}.lora_A.{each}", self.in_features**-0.5)
            self.register_parameter(f"lora_A_{each}", a)
            self.register_parameter(f"lora_B_{each}", nn.Parameter(torch.zeros(self.out_features, rank, **like)))

    def forward(self, x: Tensor, documents: Documents | None = None) -> Tensor:
        return self.beside(x, F.linear(x, self.weight, self.bias), documents)

    def beside(self, x: Tensor, out: Tensor, documents: Documents | None) -> Tensor:
        """`out` [B, T, outputs] of the base and what the adapters add to it, for `x` [B, T, inputs]."""
        if documents is None or (routing := documents.routing) is None:
            return out
        x = dropped(x, documents, self.dropout, self.place, self.first_input)
        blocks: AdapterBlocks | None = None
        if routing.dim() == 2:
            if documents.blocks is None:
                documents.blocks = AdapterBlocks.of(routing, len(self.names))
            blocks = documents.blocks
            x, routing = blocks.together(x), blocks.adapters
        a, b = (self._stacked(begin)[routing].to(x.dtype) for begin in FACTORS)
        inside = torch.bmm(x, a.transpose(1, 2))
        if blocks is not None:
            return out + blocks.apart(torch.bmm(inside, b), out.shape)
        return torch.baddbmm(out, inside, b.to(out.dtype))

    def _stacked(self, begin: str) -> Tensor:
        """The factors A [N, r, inputs], or B with the scaling in it [N, r, outputs]."""
        factors = [getattr(self, begin + each) for each in self.names]
        if begin == FACTORS[1]:
            factors = [b.T * scaling for b, scaling in zip(factors, self.scalings, strict=True)]
        stacked = pad_sequence(factors, batch_first=True)  # by rank
        return self.of_all[begin](stacked) if begin in self.of_all else stacked


def adapted(block: nn.Module, adapters: AdaptersConfig | None, seed: Seed) -> nn.Module:
    """The block with adapters beside the linear maps that they are for; as it is where there are none."""
    if adapters is None:
        return block
    for path, module in list(block.named_modules()):
        owner, leaf = block.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2]
        if leaf in adapters.target_modules:
            setattr(owner, leaf, AdaptedLinear(module, adapters, seed, path))
    block.register_forward_pre_hook(_spread)
    return block


def _spread(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Where all rows are for all adapters, the first block that has some gets them once for each, as those after it do."""
    x, documents, *others = arguments
    if (spread := documents.spread) is None:
        return arguments
    times = len(spread.position_ids) // len(x)
    return x.repeat(times, 1, 1) if times > 1 else x, spread, *others
