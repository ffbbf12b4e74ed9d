"""Which CPU kernel for causal attention: flash attention of torch beside block-by-block matrix products.

    python -m bench.kernels [--tokens 256 1024 4096]

Forward and backward of 12 heads of width 64 over one document, milliseconds, the contenders in turn, the best of several
rounds. `blocks` takes each block of queries against its prefix of keys only, with two matrix products forward and five
backward, and keeps a log-sum-exp a query, as flash attention does; `compiled` is the same under torch.compile.
model/attention.py uses what wins here.
"""

import functools
import math

from console.command import CommandParser


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096], help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    arguments = parser.parse_args()
    import torch

    from bench.kernel_contenders import HEADS, WIDTH, contenders, milliseconds

    kernels = contenders()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'':20s}" + "".join(f"{name:>18s}" for name in kernels))
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in arguments.tokens:
            draw = functools.partial(torch.randn, HEADS, tokens, WIDTH, generator=torch.Generator().manual_seed(0))
            *tensors, grad = (draw().to(dtype).requires_grad_() for _ in range(4))
            for attention in kernels.values():
                milliseconds(attention, tensors, grad)
            best = dict.fromkeys(kernels, math.inf)
            for _ in range(arguments.rounds):
                for name, attention in kernels.items():
                    best[name] = min(best[name], milliseconds(attention, tensors, grad))
            cells = "".join(f"{value:18.1f}" for value in best.values())
            print(f"{str(dtype).removeprefix('torch.'):10s} T={tokens:<8,d}{cells}", flush=True)


if __name__ == "__main__":
    main()
