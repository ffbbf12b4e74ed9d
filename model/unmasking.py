"""Text generation by models that predict masked tokens: chunk by chunk, each unmasked in several steps.

A new chunk starts as masks. Each step predicts all of them and keeps the predictions that the model is surest of (Chang et
al. 2022, MaskGIT, section 3.2; Nie et al. 2025, LLaDA, section 2.4). A finished chunk is never looked at again: its keys
and values are kept (Arriola et al. 2025, Block Diffusion, section 3.3). Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from .attention import KeyValueCache
from .documents import Documents
from .generation import check_request, sample
from .llama import Llama
from .rope import frequencies_of_length, rotary_tables


def unmask(
    model: Llama,
    input_ids: Tensor,
    max_new_tokens: int,
    mask_id: int,
    steps: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[list[int]]:
    """Yield the continuation of one prompt, the new tokens of a chunk at a time.

    `input_ids`: int64 [T], may be empty. With full attention everything new is one chunk, and the prompt is read again in
    each step. `steps`: of a chunk, at most one a token, which is the default. `temperature`, `top_k` and `top_p` as in
    `generation.generate`. Raises ValueError, at once, for values out of range and for more tokens than learned positions.
    """
    if max_new_tokens < 1 or (steps is not None and steps < 1):
        raise ValueError("unmasking needs at least one new token and one step")
    check_request(model, input_ids.numel(), max_new_tokens, temperature, top_k, top_p)
    choose = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    return _chunks(model, input_ids.reshape(-1), input_ids.numel() + max_new_tokens, mask_id, steps, choose)


def _chunks(
    model: Llama, ids: Tensor, end: int, mask_id: int, steps: int | None, choose: Callable[[Tensor], int]
) -> Iterator[list[int]]:
    chunk_size = model.config.chunk_size or end
    states = _States(model, end)
    while len(ids) < end:
        finished = len(ids) // chunk_size * chunk_size
        here = ids.new_full((min(chunk_size, end - finished),), mask_id)
        known = len(ids) - finished
        here[:known] = ids[finished:]
        open_, left = torch.arange(known, len(here)), steps or len(here) - known
        while len(open_):
            logits = states.logits(ids[:finished], here)[open_.to(here.device)]
            logits[:, mask_id] = -torch.inf
            tokens = torch.tensor([choose(row) for row in logits])
            sureness = logits.float().cpu().softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
            surest = sureness.sort(descending=True, stable=True).indices[: -(-len(open_) // max(left, 1))]
            here[open_[surest].to(here.device)] = tokens[surest].to(here.device)
            open_, left = open_[~torch.isin(torch.arange(len(open_)), surest)], left - 1
        ids = torch.cat([ids[:finished], here])
        yield here[known:].tolist()


class _States:
    """Keys and values of the finished chunks, and predictions for the one that follows them."""

    def __init__(self, model: Llama, capacity_tokens: int) -> None:
        self.model, self.capacity_tokens = model, capacity_tokens
        self.caches: list[KeyValueCache] = []
        self.frequencies: tuple[float, ...] | None = None
        self.kept = 0

    @torch.inference_mode()
    def logits(self, finished: Tensor, here: Tensor) -> Tensor:
        """[c, V] at the tokens `here` [c], after the whole chunks `finished` [n]."""
        tokens = len(finished) + len(here)
        frequencies = frequencies_of_length(self.model.config, tokens)
        if frequencies != self.frequencies:
            self.caches = [KeyValueCache(self.capacity_tokens) for _ in self.model.layers]
            self.kept, self.frequencies = 0, frequencies
        if len(finished) > self.kept:
            # all whole chunks of the prompt at once, or one more
            self._read(finished[self.kept :], tokens)
            self.kept = len(finished)
        x = self._read(here, tokens)
        return self.model.lm_head(self.model.norm(x))[0].clone()

    def _read(self, ids: Tensor, tokens: int) -> Tensor:
        """Hidden states [1, n, D] of the tokens that follow the kept ones, in a document to be of `tokens` tokens."""
        for cache in self.caches:
            cache.tokens = self.kept
        whole = Documents.stretch(self.kept, self.kept + len(ids), tokens, ids.device)
        x = self.model.embed(ids.unsqueeze(0), whole)
        documents = Documents.whole_rows(1, len(ids), ids.device)
        if self.model.config.position_embedding == "rope":
            documents.rotary = rotary_tables(self.model.config, whole)
        for block, cache in zip(self.model.layers, self.caches, strict=True):
            x = block(x, documents, cache)
        return x
