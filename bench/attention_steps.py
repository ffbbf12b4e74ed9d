"""The training steps that `bench.attention` measures."""

import math
import resource
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from engine.layout.deal import dealt_columns
from model.attention import CAUSAL, attend
from model.config import ModelConfig
from model.documents import Documents
from model.hf.weights import to_hf_state
from model.llama import Block, Llama
from model.part_attention import RowPart, attend_part
from model.segments import seen_keys, segments
from model.visibility import Visibility

CONFIG = ModelConfig(
    vocab_size=512,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=1,
    num_attention_heads=12,
    max_position_embeddings=1 << 17,
    tie_word_embeddings=True,
)
CHUNK_TOKENS = 512
CHUNKED = CONFIG.model_copy(update={"is_causal": False, "attention": "chunked", "chunk_size": CHUNK_TOKENS})
DOCUMENT_TOKENS = 1024
ROWS = ("one document", "chunks of 512", "documents of 1k", "1 of 8 ranks")
CONTENDERS = ("longform", "dense mask", "transformers")
LEFT_OUT = {("1 of 8 ranks", "transformers")}
"""It has no such form."""
SEQUENCE_RANKS, SEQUENCE_RANK = 8, 3


def dense(q: Tensor, k: Tensor, v: Tensor, documents: Documents, visibility: Visibility = CAUSAL) -> Tensor:
    """`model.attention.attend` with all scores under one mask."""
    tokens = documents.tokens()
    mask = visibility.sees(tokens.at((slice(None), None)), tokens)
    q, k, v = (x.flatten(0, 1).transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).squeeze(0).transpose(0, 1).unsqueeze(0)


def attend_columns(q: Tensor, k: Tensor, v: Tensor, documents: Documents, visibility: Visibility = CAUSAL) -> Tensor:
    """What a rank of a sequence group computes once it has the keys that it needs. Here its own stand for the others'."""
    if documents.exchange is None:
        found = segments(documents, documents.columns)
        documents.exchange = RowPart(found, seen_keys(found, visibility, sum(documents.lengths)))
    k, v = _as_many(documents.exchange.seen, k, v)
    return attend_part(q, k, v, documents, visibility, documents.exchange)


def dense_columns(q: Tensor, k: Tensor, v: Tensor, documents: Documents, visibility: Visibility = CAUSAL) -> Tensor:
    """The same with all scores under one mask."""
    tokens = documents.tokens()
    seen = visibility.sees(tokens.at((documents.columns, None)), tokens)
    k, v = (x.transpose(0, 1).unsqueeze(0) for x in _as_many(seen.any(0), k, v))
    mask = seen[:, seen.any(0)]
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, attn_mask=mask).transpose(1, 2)


def _as_many(seen: Tensor, *tensors: Tensor) -> list[Tensor]:
    places = torch.arange(int(seen.sum()), device=tensors[0].device) % tensors[0].shape[1]
    return [x[0, places] for x in tensors]


def step_of(row: str, contender: str, tokens: int, dtype: torch.dtype, device: str) -> Callable[[int], None]:
    """A function that does one training step on the first n tokens of a row."""
    config = CHUNKED if row.startswith("chunks") else CONFIG
    ids = torch.randint(CONFIG.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    positions = torch.arange(tokens) % (DOCUMENT_TOKENS if row.startswith("documents") else tokens)
    positions = positions.unsqueeze(0).to(device)
    ours = Llama(config).to(device, dtype)
    if contender != "transformers":
        (block,) = ours.layers
        assert isinstance(block, Block)
        if row == "1 of 8 ranks":
            block.self_attn.attend = dense_columns if contender == "dense mask" else attend_columns
            return lambda n: step_of_rank(ours, ids[:, :n], positions[:, :n])
        block.self_attn.attend = dense if contender == "dense mask" else attend
        return lambda n: (ours(ids[:, :n], positions[:, :n], ids[:, :n])[0] / n).backward()
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG.to_hf()), attn_implementation="sdpa")
    theirs.load_state_dict(to_hf_state(ours.state_dict(), CONFIG), strict=False)
    theirs = theirs.to(device, dtype)

    def step(n: int) -> None:
        extra: dict[str, Tensor] = {}
        if row.startswith("chunks"):
            chunk = positions[0, :n] // CHUNK_TOKENS
            extra["attention_mask"] = (chunk <= chunk.unsqueeze(1)).expand(1, 1, n, n)
        ids_, places = ids[:, :n], positions[:, :n]
        theirs(ids_, position_ids=places, shift_labels=ids_, labels=ids_, use_cache=False, **extra).loss.backward()

    return step


def step_of_rank(ours: Llama, ids: Tensor, positions: Tensor) -> None:
    documents = Documents.from_position_ids(positions.cpu())
    columns = dealt_columns(documents, CAUSAL, SEQUENCE_RANKS)[SEQUENCE_RANK]
    here = ids[:, columns.to(ids.device)]
    (ours(here, positions.cpu(), here, columns=columns)[0] / here.numel()).backward()


def measure(row: str, contender: str, tokens: int, dtype: str, device: str, repeats: int) -> tuple[float, float]:
    """Seconds of the fastest step, and MB that the steps need. To be run in a fresh process."""
    step = step_of(row, contender, tokens, getattr(torch, dtype), device)
    step(tokens if device == "cuda" else 64)  # loads the kernels, on a GPU compiles them
    before, seconds = peak_bytes(device), math.inf
    for _ in range(repeats):
        began = time.perf_counter()
        step(tokens)
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = min(seconds, time.perf_counter() - began)
    return seconds, (peak_bytes(device) - before * (device == "cpu")) / 1e6


def peak_bytes(device: str) -> int:
    """Most memory so far: of the GPU, or of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
