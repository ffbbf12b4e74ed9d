"""The training steps that `bench.model` measures, and their figures."""

import argparse
import gc
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from bench.contestants import CONTESTANTS, Problem, Step, left_out
from engine.attention_kernel import prefers_products
from model.config import ModelConfig
from training.config import load_recipe
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
FIRST, THEIRS = "longform", "transformers"
MOST_ROUNDS = 10


class Timing(NamedTuple):
    """Of one step."""

    clock: float
    """Seconds, as is the next."""
    work: float
    """Of the process on CPUs."""
    loss: float


def compare(args: argparse.Namespace) -> None:
    """All contestants, then their figures."""
    problem = problem_of(args)
    names = args.contestants or list(CONTESTANTS)
    if unknown := sorted({*names} - {*CONTESTANTS}):
        raise ValueError(f"--contestants {unknown[0]} is none of {', '.join(CONTESTANTS)}")
    reasons = {name: left_out(name, problem) for name in names}
    for name in [name for name, reason in reasons.items() if reason]:
        print(f"{name} is left out: {reasons[name]}")
        names.remove(name)
    in_turn = problem.device.type == "cpu"
    runs: dict[str, list[Timing]] = {}
    memory: dict[str, int] = {}
    for together in [names] if in_turn else [[name] for name in names]:
        try:
            runs |= rounds({name: CONTESTANTS[name](problem) for name in together}, args)
        except torch.cuda.OutOfMemoryError:
            print(f"{together[0]} is out of memory")
        if not in_turn:
            memory[together[0]] = torch.cuda.max_memory_allocated()
            gc.collect()
            torch.compiler.reset()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    report(args, problem, runs, memory)


def problem_of(args: argparse.Namespace) -> Problem:
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = load_recipe(args.recipe, {}).model if args.recipe else LLAMA_110M
    config = config.model_copy(update={"max_position_embeddings": max(config.max_position_embeddings, args.tokens)})
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (args.batch, args.tokens + 1), generator=generator)
    rows = [document_lengths(args.tokens, args.documents, generator) for _ in range(args.batch)]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    products = device.type == "cpu" and args.dtype == "bfloat16" and prefers_products(args.kernel, config)
    return Problem(config, ids.to(device), positions, getattr(torch, args.dtype), args.recompute, products)


def document_lengths(tokens: int, mean: int | None, generator: torch.Generator) -> list[int]:
    """Of the documents of a row: exponentially distributed, the last one cut."""
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        drawn = left if mean is None else 1 + int(torch.empty(()).exponential_(1 / mean, generator=generator))
        lengths.append(min(drawn, left))
    return lengths


def rounds(steps: dict[str, Step], args: argparse.Namespace) -> dict[str, list[Timing]]:
    """Timings of each, in turn."""
    runs: dict[str, list[Timing]] = {name: [] for name in steps}
    for name, step in steps.items():
        for _ in range(2):  # loads the kernels, compiles; the second has the gradients' memory
            step().item()
        if args.trace:
            trace(step, args.trace / f"{name.replace(' ', '-')}.json.gz")
    began = time.perf_counter()
    while any(not timings for timings in runs.values()) or (
        time.perf_counter() - began < args.seconds and len(next(iter(runs.values()))) < MOST_ROUNDS
    ):
        for name, step in steps.items():
            runs[name].append(timed(step))
    return runs


def trace(step: Step, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as profiler:
        step().item()
    profiler.export_chrome_trace(str(file))


def timed(step: Step) -> Timing:
    clock, work = time.perf_counter(), time.process_time()
    loss = step().item()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Timing(time.perf_counter() - clock, time.process_time() - work, loss)


def report(args: argparse.Namespace, problem: Problem, runs: dict[str, list[Timing]], memory: dict[str, int]) -> None:
    config, on_gpu = problem.config, problem.device.type == "cuda"
    peak = peak_rate(problem.device, problem.dtype)
    tokens = args.batch * args.tokens
    flops = flops_of(problem)
    what = f"{config.num_parameters() / 1e6:,.0f}M parameters, {args.batch} x {args.tokens} tokens"
    what += f" in documents of {args.documents} on average" if args.documents else ""
    what += ", recomputed" if args.recompute else ""
    device = torch.cuda.get_device_name(problem.device) if on_gpu else "cpu"
    print(f"{what}, {args.dtype}, {device}, torch {torch.__version__}")
    print(f"{'':22s} {'tokens/s':>10s} {'s/step':>8s} {'GB' if on_gpu else 'cpu s':>8s} {peak.label:>8s} {'loss':>9s}")
    for name, timings in runs.items():
        clock, work, loss = (statistics.median(column) for column in zip(*timings, strict=True))
        share = flops / clock / peak.flops_per_second
        third = memory[name] / 1e9 if on_gpu else work
        print(f"{name:22s} {tokens / clock:10.0f} {clock:8.3f} {third:8.3f} {share:8.1%} {loss:9.4f}")
    if THEIRS not in runs:
        return
    for name in [name for name in runs if name.split()[0] == FIRST]:
        for column, by in ((0, "by the clock"), (1, "by CPU time"))[: 1 if on_gpu else 2]:
            pairs = zip(runs[name], runs[THEIRS], strict=False)
            ratios = [theirs[column] / ours[column] for ours, theirs in pairs]
            each = ", ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"{name} / {THEIRS} {by}: {statistics.median(ratios):.2f}x (rounds {each})")


def flops_of(problem: Problem) -> float:
    """Of a step, attention counted in each document by itself."""
    ends = [[*(row == 0).nonzero().flatten().tolist(), len(row)] for row in problem.position_ids]
    lengths = [end - start for row in ends for start, end in pairwise(row)]
    return sum(n * problem.config.flops_per_token(n) for n in lengths)
