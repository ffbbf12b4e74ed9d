"""One training step, forward, loss and backward, of a LLaMA of one shape, as this repository and others do it.

All get the same ids and, where rows are packed, the same documents. `transformers` gets the same weights too.
"""

import importlib.metadata
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from engine.build import compile_blocks
from model.attention import use_products
from model.config import ModelConfig
from model.documents import Documents
from model.hf.weights import to_hf_state
from model.llama import Llama


class Problem(NamedTuple):
    """What every contestant computes."""

    config: ModelConfig
    ids: Tensor
    """int64 [B, T + 1] on the device."""
    position_ids: Tensor
    """int64 [B, T] on the CPU: 0 where a document starts."""
    dtype: torch.dtype
    recompute: bool
    """Whether activations of blocks are made again in the backward pass."""
    products: bool
    """Whether ours attends by products of blocks where it can (model/causal_products.py)."""

    @property
    def device(self) -> torch.device:
        return self.ids.device

    @property
    def packed(self) -> bool:
        return int((self.position_ids == 0).sum()) > len(self.ids)


Step = Callable[[], Tensor]
"""The mean loss, after forward and backward."""


def longform(problem: Problem, compiled: bool = False) -> Step:
    model = _ours(problem)
    if problem.products:
        use_products(model)
    model.activation_checkpointing = problem.recompute
    if compiled:
        compile_blocks(model)
    ids, targets = _shifted(problem)

    def step() -> Tensor:
        objective, _ = model(ids, problem.position_ids, targets=targets)
        return _backward(model, objective / targets.numel())

    return step


def transformers(problem: Problem, attention: str = "sdpa", compiled: bool = False) -> Step:
    config = AutoConfig.for_model(**problem.config.to_hf())
    with problem.device:
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=problem.dtype)
    model.load_state_dict(to_hf_state(_ours(problem).state_dict(), problem.config), strict=False)
    model.tie_weights()
    if problem.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    ids, targets = _shifted(problem)
    places = {"position_ids": problem.position_ids.to(problem.device)} if problem.packed else {}
    forward = torch.compile(model) if compiled else model

    def step() -> Tensor:
        return _backward(model, forward(ids, labels=ids, shift_labels=targets, use_cache=False, **places).loss)

    return step


def litgpt(problem: Problem, compiled: bool = False) -> Step:
    """With the loss of its pretraining, in chunks of 128 tokens."""
    from litgpt import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    c = problem.config
    config = Config(
        n_layer=c.num_hidden_layers,
        n_head=c.num_attention_heads,
        n_query_groups=c.kv_heads,
        n_embd=c.hidden_size,
        head_size=c.head_width,
        intermediate_size=c.intermediate_size,
        padded_vocab_size=c.vocab_size,
        vocab_size=c.vocab_size,
        block_size=problem.ids.shape[1] - 1,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        rope_base=int(c.rope_theta),
    )
    with problem.device:
        model = GPT(config).to(problem.dtype)
    forward = torch.compile(model) if compiled else model
    ids, targets = _shifted(problem)

    def step() -> Tensor:
        return _backward(model, chunked_cross_entropy(forward(ids), targets))

    return step


def torchtitan(problem: Problem) -> Step:
    """Each block compiled, as its trainer does, and the loss."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torchtitan.models.attention import VarlenMetadata
    from torchtitan.models.llama3.model.args import TransformerModelArgs
    from torchtitan.models.llama3.model.model import Transformer

    c, (ids, targets) = problem.config, _shifted(problem)
    args = TransformerModelArgs(
        dim=c.hidden_size,
        n_layers=c.num_hidden_layers,
        n_heads=c.num_attention_heads,
        n_kv_heads=c.kv_heads,
        vocab_size=c.vocab_size,
        multiple_of=c.intermediate_size,  # with this factor the next multiple is the width itself
        ffn_dim_multiplier=0.1,
        rope_theta=c.rope_theta,
        max_seq_len=ids.shape[1],
        attn_type="varlen" if problem.packed else "sdpa",
    )
    with problem.device, torch.no_grad():
        model = Transformer(args)
        model.init_weights(problem.device)
    frequencies = model.freqs_cis
    model.to(problem.dtype)
    model.freqs_cis = frequencies  # complex numbers have no bfloat16
    for name, block in model.layers.named_children():
        block = checkpoint_wrapper(block, preserve_rng_state=False) if problem.recompute else block
        block.compile(fullgraph=not problem.packed)
        model.layers.register_module(name, block)
    places: dict[str, Any] = {}
    if problem.packed:
        documents = Documents.from_position_ids(problem.position_ids, problem.device)
        starts, longest = documents.cu_seqlens, documents.max_length
        masks = VarlenMetadata(cu_seq_q=starts, cu_seq_k=starts, max_q=longest, max_k=longest)
        places = {"attention_masks": masks, "positions": documents.position_ids}

    def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    loss = torch.compile(cross_entropy)

    def step() -> Tensor:
        return _backward(model, loss(model(ids, **places), targets))

    return step


CONTESTANTS: dict[str, Callable[[Problem], Step]] = {
    "longform": longform,
    "longform compiled": partial(longform, compiled=True),
    "transformers": transformers,
    "transformers compiled": partial(transformers, compiled=True),
    "transformers flex": partial(transformers, attention="flex_attention"),
    "litgpt": litgpt,
    "litgpt compiled": partial(litgpt, compiled=True),
    "torchtitan": torchtitan,
}


def left_out(name: str, problem: Problem) -> str | None:
    """Why this contestant cannot take part."""
    package = name.split()[0]
    if package in ("litgpt", "torchtitan"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "is not installed (requirements-bench.txt)"
    if package == "torchtitan" and problem.device.type != "cuda":
        return "needs a GPU"
    if name == "transformers flex" and problem.device.type != "cuda":
        return "FlexAttention has no backward pass on CPUs"
    if package == "litgpt" and (problem.packed or problem.recompute):
        return "its model knows neither packed documents nor recomputation"
    return None


def _ours(problem: Problem) -> Llama:
    """Weights drawn on the device, so that large ones take no time."""
    with torch.device("meta"):
        model = Llama(problem.config)
    model = model.to_empty(device=problem.device).to(problem.dtype)
    if problem.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    generator = torch.Generator(problem.device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, problem.config.initializer_range, generator=generator)
    return model


def _shifted(problem: Problem) -> tuple[Tensor, Tensor]:
    return problem.ids[:, :-1].contiguous(), problem.ids[:, 1:].contiguous()


def _backward(model: nn.Module, loss: Tensor) -> Tensor:
    loss.backward()
    model.zero_grad(set_to_none=True)
    return loss.detach()
