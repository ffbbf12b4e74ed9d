"""Tiny configs, an attention written as the formula, and an observer of tensor sizes."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.config import ModelConfig

SCALINGS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "yarn_tuned": {
        "rope_type": "yarn",
        "factor": 8.0,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.8,
        "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
        "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
        "original_max_position_embeddings": 16,
    },
}


def tiny(**changes) -> ModelConfig:
    """Two blocks of width 64, four query heads of width 16, two key/value heads, 32 positions."""
    fields = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "initializer_range": 0.2,
    }
    return ModelConfig(**(fields | changes))


def positions(*rows: list[int]) -> torch.Tensor:
    """Position ids of rows given as lists of document lengths."""
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


def formula(q, k, v, documents, visibility):
    """softmax(Q K^T / sqrt(d)) V for [B, T, H, d] rows of documents, masks and all, in the dtype given."""
    shape, (q, k, v) = q.shape, (x.flatten(0, 1) for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    tokens = documents.tokens()
    seen = visibility.sees(tokens.at((slice(None), None)), tokens)
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).view(shape)


class TensorSizes(TorchDispatchMode):
    """While active, remembers the number of elements of every tensor that an operator returns, backward included."""

    def __init__(self):
        super().__init__()
        self.largest, self.shape = 0, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            # a view by expand holds no more than its storage
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().nbytes() // leaf.itemsize > self.largest:
                self.largest = leaf.untyped_storage().nbytes() // leaf.itemsize
                self.shape = tuple(leaf.shape)
        return out
