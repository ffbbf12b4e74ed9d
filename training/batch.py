"""What a rank computes on at a time."""

from typing import NotRequired, TypedDict

from torch import Tensor


class Batch(TypedDict):
    """B rows of T tokens. A document begins where position_ids is 0; padding counts as one more document."""

    input_ids: Tensor  # int64 [B, T]
    position_ids: Tensor  # int64 [B, T]
    targets: Tensor  # int64 [B, T], NO_TARGET where no loss is taken
    num_targets: int
    target_weights: NotRequired[Tensor]  # float32 [B, T], what each target counts; where tokens are masked
    adapters: NotRequired[
        Tensor
    ]  # int64 [B] or [B, T], the adapter of each row or token, by its place in the recipe's names
    sources: NotRequired[Tensor]  # int64 [B], what the rows come from, by its place in all that a run reads
    seeds: NotRequired[Tensor]  # int64 [B], of what is drawn for the rows, where something is
    pairs: NotRequired[Tensor]  # int64 [n, 2], the row of each pair of texts, and which of the row's documents it is
    samples: NotRequired[Tensor]  # int64 [B], which of the stage's order the rows are; in training
    copies: NotRequired[int]  # of each row, side by side, noised and clean; T is then theirs together
