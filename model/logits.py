"""The largest attention logit, of a few queries: kernels of attention never hold the scores.

Logits that grow without bound come before a loss that diverges (Dehghani et al. 2023, Scaling vision transformers to 22
billion parameters, section 2.2; Zhai et al. 2023, Stabilizing transformer training by preventing attention entropy collapse).

Legend: B rows, T tokens of a row, t of them here, H query heads, K key/value heads, d head width, n queries, m keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .documents import Documents
from .part_attention import RowPart
from .visibility import Tokens, Visibility

QUERIES = 1024
"""Of a row that are looked at: all of a shorter one."""
SCORES = 2**24
"""That are held at a time."""


@torch.no_grad()
def largest_logit(
    q: Tensor, k: Tensor, documents: Documents, visibility: Visibility, row: int, part: RowPart | None
) -> Tensor:
    """Over all heads that are here, a row's queries in evenly spread columns, and all keys that these see. Float32, a scalar.

    `q` [B, t, H, d]; `k` [B, T, K, d], or the [m, K, d] that a `part` of the row sees. `-inf` where no such query is here.
    """
    tokens, size = documents.tokens(), sum(documents.lengths) // len(documents.position_ids)
    device, stride = q.device, -(-size // QUERIES)
    if part is None:
        columns = torch.arange(size, device=device)
        keys, places = k[row], row * size + columns
    else:
        assert isinstance(documents.columns, Tensor)
        columns, seen = documents.columns.to(device), part.seen.nonzero().flatten().to(device)
        inside = seen // size == row
        keys, places = k[inside], seen[inside]
    chosen = columns % stride == 0
    queries = tokens.at(row * size + columns[chosen])
    return _largest(q[row, chosen], keys, queries, tokens.at(places), visibility)


def _largest(q: Tensor, k: Tensor, queries: Tokens, keys: Tokens, visibility: Visibility) -> Tensor:
    """`q` [n, H, d], `k` [m, K, d], in float32 whatever they are in."""
    heads, group = k.shape[1], q.shape[1] // k.shape[1]
    largest = torch.full((), -torch.inf, device=q.device)
    at_once = max(1, SCORES // (group * max(1, len(k))))
    with torch.autocast(q.device.type, enabled=False):
        for first in range(0, len(q), at_once):
            some = slice(first, first + at_once)
            sees = visibility.sees(queries.at((some, None)), keys)
            for head in range(heads):
                of_head = q[some, head * group : (head + 1) * group].float().transpose(0, 1)  # [H / K, n, d]
                scores = (of_head @ k[:, head].float().T).masked_fill_(~sees, -torch.inf)
                largest = torch.maximum(largest, scores.amax())
    return largest * q.shape[-1] ** -0.5
