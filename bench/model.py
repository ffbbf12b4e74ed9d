"""Training-step speed of this model beside others of the same shape: same batch, dtype and, where rows are packed, documents.

    python -m bench.model [--recipe recipes/llama-1b.yaml] [--batch 2] [--tokens 1024] [--documents 512] [--device cpu|cuda]

A step is forward, loss and backward; without --recipe of a 110M LLaMA. On CPUs they take turns, so that a busy machine slows all
alike; on a GPU they come one after the other, since they would not fit together. A ratio is the median over the rounds. The
share is MFU on a GPU of known peak, elsewhere of the best matrix-product rate measured in the same run. CPU time compares best
with OMP_NUM_THREADS=1.
"""

from pathlib import Path

from console.command import CommandParser


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, help="whose model it is (default: one of 110M)")
    parser.add_argument("--batch", type=int, default=2, help="rows (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--documents", type=int, help="mean tokens of packed documents (default: a row is one)")
    parser.add_argument("--recompute", action="store_true", help="make activations again in the backward pass")
    parser.add_argument("--contestants", nargs="+", help="of those of bench/contestants.py (default: all)")
    parser.add_argument("--seconds", type=float, default=60, help="start no round after this (default: %(default)s)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="default: %(default)s")
    parser.add_argument(
        "--kernel", choices=["auto", "flash", "products"], default="auto", help="as training.attention_kernel"
    )
    parser.add_argument("--device", help="default: cuda where there is a GPU, else cpu")
    parser.add_argument("--trace", type=Path, help="write a torch.profiler trace of a step of each into this folder")
    args = parser.parse_args()
    from bench.model_steps import compare

    compare(args)


if __name__ == "__main__":
    main()
