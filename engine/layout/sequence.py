"""Sequence parallelism: every rank of a group holds a part of each row's tokens and, inside attention, a part of the heads.

Two all-to-all exchanges a block turn the one cut into the other (Jacobs et al. 2023, DeepSpeed-Ulysses). Everything else in
the model works on tokens one by one. To ZeRO these ranks are data-parallel ranks like any other: each has the gradient of
its own tokens' share of the loss, and the average over all ranks, which the loss is weighted for, is the same at every stage.
"""

import torch.distributed as dist
from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor, nn

from engine.layout.mesh import Mesh
from model.attention import attend
from model.config import ModelConfig
from model.documents import Documents
from model.llama import Attention
from model.visibility import Visibility


class UlyssesAttention(nn.Module):
    """Takes the place of `model.attention.attend`: the same arguments for this rank's T / n tokens of each row."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.size = group.size()
        self.exchange = DistributedAttention(attend, group, scatter_idx=2, gather_idx=1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents, visibility: Visibility) -> Tensor:
        """`q` [B, T / n, H, d], `k` and `v` [B, T / n, K, d]; `documents` of the whole rows. Returns [B, T / n, H, d]."""
        if (copies := self.size // k.shape[2]) > 1:  # every rank needs a key/value head of its own
            k, v = (x.repeat_interleave(copies, dim=2) for x in (k, v))
        return self.exchange(q, k, v, 0, None, documents, visibility)


def share_rows(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Let the ranks of a sequence group work on the same rows."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = UlyssesAttention(group)


def sequence_problems(config: ModelConfig, mesh: Mesh, seq_length: int) -> list[str]:
    """Why the rows and heads of a model cannot be cut over the ranks of a sequence group."""
    n, problems = mesh.sequence, []
    heads, kv_heads = config.num_attention_heads // mesh.tensor, max(config.kv_heads // mesh.tensor, 1)
    legal = [s for s in range(2, heads + 1) if heads % s == 0 and (kv_heads % s == 0 or s % kv_heads == 0)]
    if n > 1 and n not in legal:
        problems.append(
            f"sequence_parallel_size {n} does not divide the model's {heads} attention heads over {kv_heads} key/value "
            f"heads{' of a tensor-parallel rank' * (mesh.tensor > 1)}: use {' or '.join(map(str, legal)) or 'another layout'}"
        )
    if mesh.split_rows and seq_length // n % mesh.tensor:
        problems.append(
            f"tensor_parallel.split_rows does not divide {seq_length // n} tokens of a row over {mesh.tensor} ranks: set it "
            "to false, or use rows of a multiple"
        )
    if seq_length % n:
        problems.append(f"sequence_parallel_size {n} does not divide rows of {seq_length} tokens: use a divisor of it")
    return problems
