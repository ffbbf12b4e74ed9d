"""What a rank does in the tests of attention over shared rows."""

from typing import Any

import torch
import torch.distributed as dist

from engine.layout.deal import columns_here
from engine.layout.mesh import Mesh
from engine.layout.sequence import KeyAttention
from engine.reduction.wire import WireBytes
from model.documents import Documents
from model.visibility import Visibility
from tests.engine.programs import join_process_group

HEADS, KV_HEADS, WIDTH = 2, 1, 8


def tensors(rows: int, tokens: int) -> list[torch.Tensor]:
    """Queries, keys, values and the gradient of what is made of them."""
    generator = torch.Generator().manual_seed(0)
    heads = HEADS, KV_HEADS, KV_HEADS, HEADS
    return [torch.randn(rows, tokens, each, WIDTH, generator=generator) for each in heads]


def by_keys(position_ids: torch.Tensor, visibility: Visibility, copies: int) -> dict[str, Any]:
    """Attention of this rank's columns, with gradients, and what it sent for them."""
    join_process_group()
    assert dist.group.WORLD is not None
    mesh = Mesh(dist.get_rank(), dist.get_world_size(), sequence=dist.get_world_size(), exchange="keys")
    documents = Documents.from_position_ids(position_ids, copies=copies)
    columns = columns_here(documents, visibility, mesh)
    *of_whole, upstream = (x[:, columns] for x in tensors(*position_ids.shape))
    q, k, v = (x.requires_grad_() for x in of_whole)
    with WireBytes() as forward:
        out = KeyAttention(dist.group.WORLD, mesh)(q, k, v, documents.part(columns), visibility)
    with WireBytes() as backward:
        gradients = torch.autograd.grad(out, (q, k, v), upstream)
    sent = {"forward": forward.ring_total, "backward": backward.ring_total}
    return {"columns": columns, "values": [x.detach() for x in (out, *gradients)], "sent": sent}
