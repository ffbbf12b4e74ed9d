"""Speed and peak memory of one LLaMA layer's training step over long rows, beside a dense mask and beside transformers.

    python -m bench.attention [--tokens 1024 ... 32768] [--dtype float32] [--device cpu|cuda] [--seconds 400]

A step is forward and backward of one row of T tokens through a model of one block (width 768, 12 heads) with a small
vocabulary, so that attention is most of the work in long rows. The row is

    one document     under the causal mask,
    chunks of 512    one document, each chunk in both directions and all chunks before it (a masked model),
    documents of 1k  packed, causal, nothing seen across their ends, or
    1 of 8 ranks     the columns of one document that one rank has under sequence parallelism by keys, over the keys that
                     these see (nothing is exchanged: its own stand for the others').

`dense mask` is this model with `scaled_dot_product_attention` under one [T, T] mask instead; transformers is LlamaForCausalLM
with sdpa, which builds such a mask for packed rows. Every case runs in a process of its own; its memory is what the step
adds to the resident set, or the peak of the GPU's. A case is left out when the one before it at a shorter T says it would take
longer than `--seconds`.
"""

import math
import multiprocessing

from console.command import CommandParser


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1024 << k for k in range(6)], help="default: %(default)s"
    )
    parser.add_argument("--rows", nargs="+", help="of those above (default: all)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=400, help="of a single step (default: %(default)s)")
    arguments = parser.parse_args()
    import torch

    from bench.attention_steps import CONTENDERS, LEFT_OUT, ROWS, measure

    if unknown := set(arguments.rows or ()) - set(ROWS):
        raise ValueError(f"--rows: {', '.join(sorted(unknown))} is none of {', '.join(ROWS)}")
    how = arguments.dtype, arguments.device
    print(f"one block of width 768, {', '.join(how)}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    for row in arguments.rows or ROWS:
        print(
            f"\n{row:16s} {'':12s} " + " ".join(f"{f'T={tokens:,}':>22s}" for tokens in arguments.tokens) + "   growth"
        )
        for contender in [each for each in CONTENDERS if (row, each) not in LEFT_OUT]:
            cells: list[str] = []
            times: list[float] = []
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
