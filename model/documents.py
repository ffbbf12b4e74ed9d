"""Which tokens of a packed batch belong together. Legend: B batch, T tokens of a row, N documents, d head width."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from .visibility import Tokens


class QueryBlock(NamedTuple):
    """Queries and the keys that they see."""

    queries: slice
    """Places among the queries that are here: in the flattened rows, if all are."""
    prefix: slice
    """Keys that all of the queries see: places in the flattened rows, or among the keys that are here."""
    near: tuple[slice, ...]
    """Further keys, of which `mask` says who sees which."""
    mask: Tensor | None
    """bool [b, keys of `near`]; None: all see all."""


@dataclass
class Documents:
    """The documents of a batch of rows, derived once a forward from `position_ids` and handed to every layer.

    A document starts where the position is 0 and at the start of every row; it ends before the next start. Attention
    stays inside. Padding is a document of its own.
    """

    position_ids: Tensor
    """int64 [B, T], the place of each token in its document; of the tokens that are here (see `part`)."""
    lengths: list[int]
    """Tokens of each document, in the order of the flattened rows; they sum to B * T."""
    cu_seqlens: Tensor
    """int32 [N + 1] on the device of the model: where each document starts in the flattened rows, then B * T."""
    columns: slice | Tensor = field(default_factory=lambda: slice(None))
    """Which tokens of every row are here, int64 [t] ascending or a slice; the others are on other devices."""
    copies: int = 1
    """2 where the first half of every row is a noised copy of the second, which is clean."""
    rotary: tuple[Tensor, Tensor] | None = field(default=None, repr=False)
    """Made by rope.py at the first layer of a forward, for all of them."""
    block_mask: BlockMask | None = field(default=None, repr=False)
    """The same of attention.py, where FlexAttention attends."""
    query_blocks: list[QueryBlock] | None = field(default=None, repr=False)
    """The same of block_attention.py."""
    exchange: Any = field(default=None, repr=False)
    """The same of whoever fetches keys from other devices."""
    routing: Tensor | None = None
    """int64 [B]: the adapter of each row, or [B, T] of each token that is here; None: the base computes alone."""
    sources: Tensor | None = None
    """int64 [B]: what the rows come from; None: they do not say."""
    seeds: Tensor | None = None
    """int64 [B]: of what is drawn for the rows; None: nothing is."""
    blocks: Any = field(default=None, repr=False)
    """The same of adapters.py, where tokens of a row have several adapters."""
    spread: Documents | None = field(default=None, repr=False)
    """The same rows once for each of several adapters, from the first layer on that has some; None: rows have one or none."""

    @classmethod
    def from_position_ids(cls, position_ids: Tensor, device: torch.device | None = None, copies: int = 1) -> Documents:
        """`position_ids` [B, T]; left on the CPU they cost no synchronisation when the model is on an accelerator."""
        begins = position_ids.numpy(force=True) == 0  # torch would wake its threads for it, which takes milliseconds
        begins[:, :: position_ids.shape[1] // copies] = True
        starts = [*np.flatnonzero(begins).tolist(), position_ids.numel()]
        lengths = [end - start for start, end in pairwise(starts)]
        device = device or position_ids.device
        cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=device)
        return cls(position_ids.to(device, non_blocking=True), lengths, cu_seqlens, copies=copies)

    @classmethod
    def whole_rows(cls, rows: int, tokens: int, device: torch.device | None = None) -> Documents:
        """Every row is one document."""
        positions = torch.arange(tokens, device=device).expand(rows, tokens)
        starts = torch.arange(rows + 1, device=device) * tokens
        return cls(positions, [tokens] * rows, starts.int())

    @classmethod
    def stretch(cls, first: int, last: int, tokens: int, device: torch.device | None = None) -> Documents:
        """The tokens first .. last - 1 of one document of `tokens` tokens (decoding with a cache)."""
        positions = torch.arange(first, last, device=device).unsqueeze(0)
        starts = torch.tensor([0, tokens], dtype=torch.int32, device=device)
        return cls(positions, [tokens], starts)

    def part(self, columns: slice | Tensor) -> Documents:
        """The same documents where only some columns of the rows are at hand, as under sequence parallelism."""
        return Documents(self.position_ids[:, columns], self.lengths, self.cu_seqlens, columns, self.copies)

    def route(
        self, adapters: Tensor | None, members: int, sources: Tensor | None = None, seeds: Tensor | None = None
    ) -> None:
        """Give each row (int64 [B]) or token ([B, T]) its adapter, or all rows to so many `members`, or to the base; and each
        row its source and its seed."""
        self.sources, self.seeds = (
            None if each is None else each.to(self.position_ids.device) for each in (sources, seeds)
        )
        self.routing = None if adapters is None else adapters.to(self.position_ids.device)
        if adapters is not None or not members:
            return
        rows, total = len(self.position_ids), sum(self.lengths)
        starts = [self.cu_seqlens[:-1] + member * total for member in range(members)]
        cu_seqlens = torch.cat([*starts, self.cu_seqlens.new_tensor([members * total])])
        positions = self.position_ids.repeat(members, 1)
        self.spread = Documents(positions, self.lengths * members, cu_seqlens, self.columns, self.copies)
        self.spread.routing = torch.arange(members, device=positions.device).repeat_interleave(rows)
        if self.seeds is not None:
            self.spread.seeds = self.seeds.repeat(members) + self.spread.routing

    @property
    def begins(self) -> Tensor:
        """bool [B, T] of whole rows: where documents do."""
        flat = torch.zeros(sum(self.lengths), dtype=torch.bool, device=self.cu_seqlens.device)
        return flat.index_fill(0, self.cu_seqlens[:-1].long(), True).view(len(self.position_ids), -1)

    @property
    def max_length(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)

    def tokens(self) -> Tokens:
        """What visibility depends on, [B * T] each, for all tokens of the rows, wherever they are."""
        device = self.cu_seqlens.device
        lengths = self.cu_seqlens.diff().long()
        document = torch.arange(len(lengths), device=device).repeat_interleave(lengths, output_size=sum(self.lengths))
        index = torch.arange(len(document), device=device)
        position = index - self.cu_seqlens[:-1].long()[document]
        half = len(document) // len(self.position_ids) // 2
        noised = (index // half % 2 == 0) if self.copies == 2 else torch.zeros_like(index, dtype=torch.bool)
        if self.copies == 2:
            document = document[index - half * ~noised]
        return Tokens(document, position, noised)

    def length_of_each_token(self) -> Tensor:
        """int64, shape of `position_ids`: how long the document is that the token lies in."""
        if len(self.lengths) == 1:
            return torch.full_like(self.position_ids, self.lengths[0])
        lengths = self.cu_seqlens.diff().long()
        of_rows = lengths.repeat_interleave(lengths, output_size=sum(self.lengths))
        return of_rows.view(len(self.position_ids), -1)[:, self.columns]
