"""The training steps that `bench.model` measures, and their figures."""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from engine.build import compile_blocks
from model.config import ModelConfig
from model.hf.weights import to_hf_state
from model.llama import Llama
from training.throughput import peak_rate

LLAMA_110M = ModelConfig(
    vocab_size=32000,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
)


THEIRS = "transformers sdpa"
Step = Callable[[torch.Tensor], torch.Tensor]
"""Token ids [B, T + 1] -> the mean loss, after forward and backward."""


def contestants(device: torch.device, dtype: torch.dtype) -> dict[str, Step]:
    ours, compiled = Llama(LLAMA_110M), Llama(LLAMA_110M)
    compile_blocks(compiled)
    hf_config = AutoConfig.for_model(**LLAMA_110M.to_hf())
    theirs = AutoModelForCausalLM.from_config(hf_config, attn_implementation="sdpa")
    theirs.load_state_dict(to_hf_state(ours.state_dict(), LLAMA_110M), strict=False)
    theirs.tie_weights()
    ours, compiled, theirs = (model.to(device, dtype) for model in (ours, compiled, theirs))

    def step_ours(model: Llama, ids: torch.Tensor) -> torch.Tensor:
        targets = ids[:, 1:].contiguous()
        objective, _ = model(ids[:, :-1], targets=targets)
        loss = objective / targets.numel()
        loss.backward()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    def step_theirs(ids: torch.Tensor) -> torch.Tensor:
        targets = ids[:, 1:].contiguous()
        loss = theirs(ids[:, :-1], labels=ids[:, :-1], shift_labels=targets, use_cache=False).loss
        loss.backward()
        theirs.zero_grad(set_to_none=True)
        return loss.detach()

    longform = {"longform": partial(step_ours, ours), "longform compiled": partial(step_ours, compiled)}
    return longform | {THEIRS: step_theirs}


def timed(step: Step, ids: torch.Tensor) -> tuple[float, float, float]:
    """Seconds by the clock, seconds of CPU work, and the loss of one step."""
    clock, work = time.perf_counter(), time.process_time()
    loss = step(ids).item()
    if ids.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - clock, time.process_time() - work, loss


def compare(args: argparse.Namespace) -> None:
    """All contestants in turn, then their figures."""
    device, dtype = (
        torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu")),
        getattr(torch, args.dtype),
    )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(LLAMA_110M.vocab_size, (args.batch, args.tokens + 1), generator=generator).to(device)
    steps = contestants(device, dtype)
    runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in steps}
    began = time.perf_counter()
    for step in steps.values():
        step(ids)  # loads the kernels, compiles
    while not runs["longform"] or (time.perf_counter() - began < args.seconds and len(runs["longform"]) < 10):
        for name, step in steps.items():
            runs[name].append(timed(step, ids))
    report(args, runs, device, dtype)


def report(
    args: argparse.Namespace,
    runs: dict[str, list[tuple[float, float, float]]],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    peak = peak_rate(device, dtype)
    tokens, flops = args.batch * args.tokens, LLAMA_110M.flops_per_token(args.tokens)
    size = LLAMA_110M.num_parameters() / 1e6
    print(
        f"{size:.0f}M parameters, {args.batch} x {args.tokens} tokens, {args.dtype}, {device}, torch {torch.__version__}"
    )
    print(f"{'':20s} {'tokens/s':>10s} {'s/step':>8s} {'cpu s':>8s} {peak.label:>8s} {'loss':>9s}")
    for name, steps in runs.items():
        clock, work, loss = (statistics.median(column) for column in zip(*steps, strict=True))
        share = tokens / clock * flops / peak.flops_per_second
        print(f"{name:20s} {tokens / clock:10.0f} {clock:8.3f} {work:8.3f} {share:8.1%} {loss:9.4f}")
    theirs = runs.pop(THEIRS)
    for name, ours in runs.items():
        for column, what in enumerate(("by the clock", "by CPU time")[: 1 if device.type == "cuda" else 2]):
            ratios = [other[column] / own[column] for own, other in zip(ours, theirs, strict=True)]
            rounds = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"{name} / transformers {what}: {statistics.median(ratios):.2f}x (rounds {rounds})")
