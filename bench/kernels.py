"""Causal attention in bf16 on this processor: torch's flash attention beside products of whole blocks.

    python -m bench.kernels [--tokens 128 1024 4096] [--heads 12 12] [--width 64]

Forward and backward over one document, milliseconds, the two in turn, the best of several rounds. A run measures the same
before it begins, at 512 tokens (engine/attention_kernel.py).
"""

from console.command import CommandParser


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 4096], help="default: %(default)s"
    )
    parser.add_argument(
        "--heads", type=int, nargs=2, default=[12, 12], help="of queries and of keys (default: %(default)s)"
    )
    parser.add_argument("--width", type=int, default=64, help="of a head (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    arguments = parser.parse_args()
    import torch

    from engine.attention_kernel import best_seconds

    heads, shared = arguments.heads
    print(
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {heads} on {shared} heads of {arguments.width}"
    )
    print(f"{'tokens':>8s}{'flash':>12s}{'products':>12s}{'ratio':>8s}")
    for tokens in arguments.tokens:
        flash, products = best_seconds((1, tokens, heads, arguments.width), shared, arguments.rounds)
        print(f"{tokens:8,d}{1e3 * flash:12.1f}{1e3 * products:12.1f}{flash / products:8.2f}", flush=True)


if __name__ == "__main__":
    main()
