"""What several adapters on one base cost: speed and memory beside one adapter, PEFT's mixed batch, and jobs of their own.

    python -m bench.adapters [--rows 16] [--tokens 256] [--rounds 3] [--device cpu|cuda]

A step is forward, loss and backward of an 11M LLaMA whose base is frozen, float32, adapters of rank 16 beside all linear maps.
The contenders take turns, so that a busy machine slows all alike; a ratio is the median over the rounds.
"""

from console.command import CommandParser


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16, help="of a batch, at least 16 (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="of a row (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--device", help="default: cuda where there is a GPU, else cpu")
    arguments = parser.parse_args()
    if arguments.rows < 16 or arguments.tokens < 1 or arguments.rounds < 1:
        raise ValueError("--rows must be at least 16, --tokens and --rounds at least 1")
    from bench.adapter_steps import compare

    compare(arguments.rows, arguments.tokens, arguments.rounds, arguments.device)


if __name__ == "__main__":
    main()
