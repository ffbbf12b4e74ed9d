"""Training-step speed of this model beside transformers' LlamaForCausalLM (sdpa): same weights, batch and dtype.

    python -m bench.model [--batch 2] [--tokens 1024] [--seconds 60] [--device cpu|cuda]

A step is forward, loss and backward of a 110M LLaMA; `compiled` is this model with `training.compile`. They take turns, so
that a busy machine slows all alike; a ratio is the median over the rounds, at least one and at most ten. The share is MFU on
a GPU of known peak, elsewhere of the best matrix-product rate measured in the same run. CPU time compares best with
OMP_NUM_THREADS=1.
"""

from console.command import CommandParser


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=2, help="rows (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="start no round after this (default: %(default)s)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="default: %(default)s")
    parser.add_argument("--device", help="default: cuda where there is a GPU, else cpu")
    args = parser.parse_args()
    from bench.model_steps import compare

    compare(args)


if __name__ == "__main__":
    main()
