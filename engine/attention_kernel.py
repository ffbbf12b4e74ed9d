"""What a processor attends with in bf16: torch's kernel or matrix products, whichever is faster here, measured once."""

import json
import math
import time
from functools import cache
from pathlib import Path
from typing import Any

import platformdirs
import torch

from model.attention import attend
from model.config import ModelConfig
from model.documents import Documents
from storage.atomic import write_atomically
from storage.locks import lock
from training.config import Recipe
from training.environment import cpu_name

FASTER = 1.1
"""At least so many times; else it is not worth that its results are rounded a little more."""
TOKENS, ROUNDS, FEW_HEADS = 512, 5, 8


def attends_by_products(recipe: Recipe, ds_config: dict[str, Any], device: str) -> bool:
    """Whether a run attends by model/causal_products.py where it can: what the recipe says, or what is faster here."""
    in_bf16 = any(ds_config.get(section, {}).get("enabled") for section in ("bf16", "torch_autocast"))
    return device == "cpu" and in_bf16 and prefers_products(recipe.training.attention_kernel, recipe.model)


def prefers_products(kernel: str, model: ModelConfig) -> bool:
    """The same for a value of `training.attention_kernel` and heads of this model."""
    return kernel == "products" or (kernel == "auto" and products_by_flash(model) >= FASTER)


def products_by_flash(model: ModelConfig) -> float:
    """How many times as fast as torch's kernel products are, for heads of this model on this processor and so many threads.

    Found in a second and kept in the user's cache, so that a run continues with the kernel that it began with.
    """
    heads = min(model.num_attention_heads, FEW_HEADS)
    return _kept(heads, model.head_width, torch.get_num_threads())


@cache
def _kept(heads: int, width: int, threads: int) -> float:
    key = f"{cpu_name()}, {threads} threads, torch {torch.__version__}, {heads} heads of {width}"
    file = platformdirs.user_cache_path("longform") / "attention-kernels.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with lock(file.with_suffix(".lock"), wait=True):  # which leaves the processor to one of the ranks that start
            known = _read(file)
            if key not in known:
                known[key] = round(_measured(heads, width), 2)
                write_atomically(file, json.dumps(known, indent=1).encode())
            return known[key]
    except OSError:  # no place to keep it
        return _measured(heads, width)


def _read(file: Path) -> dict[str, float]:
    try:
        known = json.loads(file.read_text())
        return {key: float(value) for key, value in known.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _measured(heads: int, width: int) -> float:
    """In turn, so that a busy machine slows both; the best of each."""
    flash, products = best_seconds((1, TOKENS, heads, width), heads, ROUNDS)
    return flash / products


def best_seconds(shape: tuple[int, int, int, int], shared: int, rounds: int) -> tuple[float, float]:
    """Of forward and backward by torch's kernel and by products, for queries of this shape [B, n, H, d] over so many heads."""
    generator, best = torch.Generator().manual_seed(0), [math.inf, math.inf]
    q, k, v, grad = (
        torch.randn(*shape[:2], heads, shape[3], generator=generator).bfloat16()
        for heads in (shape[2], shared, shared, shape[2])
    )
    tensors, documents = [x.requires_grad_() for x in (q, k, v)], Documents.whole_rows(*shape[:2])
    for _ in range(rounds):
        for place, products in enumerate((False, True)):
            began = time.perf_counter()
            with torch.enable_grad():
                torch.autograd.grad(attend(q, k, v, documents, products=products), tensors, grad)
            best[place] = min(best[place], time.perf_counter() - began)
    return best[0], best[1]
