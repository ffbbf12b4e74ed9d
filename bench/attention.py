"""Speed and peak memory of one LLaMA layer's training step over long rows, beside a dense mask and beside transformers.

    python -m bench.attention [--tokens 1024 ... 32768] [--dtype float32] [--device cpu|cuda] [--seconds 400]

A step is forward and backward of one row of T tokens through a model of one block (width 768, 12 heads) with a small
vocabulary, so that attention is most of the work in long rows. The row is

    one document     under the causal mask,
    chunks of 512    one document, each chunk in both directions and all chunks before it (a masked model), or
    documents of 1k  packed, causal, nothing seen across their ends.

`dense mask` is this model with `scaled_dot_product_attention` under one [T, T] mask instead; transformers is LlamaForCausalLM
with sdpa, which builds such a mask for packed rows. Every case runs in a process of its own; its memory is what the step
adds to the resident set, or the peak of the GPU's. A case is left out when the one before it at a shorter T says it would take
longer than `--seconds`.
"""

import math
import multiprocessing
import resource
import time

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from data_prep.command import CommandParser
from model.attention import attend
from model.config import ModelConfig
from model.hf import to_hf_state
from model.llama import Llama

CONFIG = ModelConfig(
    vocab_size=512,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=1,
    num_attention_heads=12,
    max_position_embeddings=1 << 17,
    tie_word_embeddings=True,
)
CHUNKED = CONFIG.model_copy(update={"is_causal": False, "attention": "chunked", "chunk_size": 512})
DOCUMENT_TOKENS = 1024
ROWS = ("one document", "chunks of 512", "documents of 1k")
CONTENDERS = ("longform", "dense mask", "transformers")


def dense(q, k, v, documents, visibility):
    """`model.attention.attend` with all scores under one mask."""
    tokens = documents.tokens()
    mask = visibility.sees(tokens.at((slice(None), None)), tokens)
    q, k, v = (x.flatten(0, 1).transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).squeeze(0).transpose(0, 1).unsqueeze(0)


def step_of(row: str, contender: str, tokens: int, dtype: torch.dtype, device: str):
    """A function that does one training step on the first n tokens of a row."""
    config = CHUNKED if row.startswith("chunks") else CONFIG
    ids = torch.randint(CONFIG.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0)).to(device)
    positions = torch.arange(tokens) % (DOCUMENT_TOKENS if row.startswith("documents") else tokens)
    positions = positions.unsqueeze(0).to(device)
    ours = Llama(config).to(device, dtype)
    if contender != "transformers":
        ours.layers[0].self_attn.attend = dense if contender == "dense mask" else attend
        return lambda n: (ours(ids[:, :n], positions[:, :n], ids[:, :n])[0] / n).backward()
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**CONFIG.to_hf()), attn_implementation="sdpa")
    theirs.load_state_dict(to_hf_state(ours.state_dict(), CONFIG), strict=False)
    theirs = theirs.to(device, dtype)

    def step(n: int) -> None:
        extra = {}
        if row.startswith("chunks"):
            chunk = positions[0, :n] // CHUNKED.chunk_size
            extra["attention_mask"] = (chunk <= chunk.unsqueeze(1)).expand(1, 1, n, n)
        ids_, places = ids[:, :n], positions[:, :n]
        theirs(ids_, position_ids=places, shift_labels=ids_, labels=ids_, use_cache=False, **extra).loss.backward()

    return step


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
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1024 << k for k in range(6)], help="default: %(default)s"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=400, help="of a single step (default: %(default)s)")
    arguments = parser.parse_args()
    how = arguments.dtype, arguments.device
    print(f"one block of width 768, {', '.join(how)}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    for row in ROWS:
        print(
            f"\n{row:16s} {'':12s} " + " ".join(f"{f'T={tokens:,}':>22s}" for tokens in arguments.tokens) + "   growth"
        )
        for contender in CONTENDERS:
            cells, times = [], []
            for tokens in arguments.tokens:
                growth = (tokens / arguments.tokens[len(times) - 1]) ** 2 if times else 0
                if times and times[-1] * growth > arguments.seconds:
                    cells.append("too slow")
                    continue
                repeats = 3 if tokens <= 4096 else 1
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    seconds, megabytes = pool.apply(measure, (row, contender, tokens, *how, repeats))
                times.append(seconds)
                cells.append(f"{tokens / seconds:,.0f} tok/s {megabytes:6,.0f} MB")
            print(f"{'':16s} {contender:12s} " + " ".join(f"{cell:>22s}" for cell in cells), end="")
            print(f"   {_exponent(arguments.tokens, times)}", flush=True)


def _exponent(tokens: list[int], times: list[float]) -> str:
    """By which power of T the time of the last step grew over the one before it."""
    if len(times) < 2:
        return ""
    ratio = math.log(times[-1] / times[-2]) / math.log(tokens[len(times) - 1] / tokens[len(times) - 2])
    return f"T^{ratio:.2f}"


if __name__ == "__main__":
    main()
