"""Flags of the commands that open what training made (see `tools.trained`)."""

import argparse
from collections.abc import Sequence

DTYPES = ("float32", "bfloat16", "float16")
"""Names that torch knows."""


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="folder of a run, or an exported Hugging Face folder")
    parser.add_argument("--step", type=int, help="checkpoint of a run; the newest good one by default")
    parser.add_argument(
        "--adapter", metavar="NAME", help="of a run with adapters: one, a sum NAME=0.5,NAME=0.5, their mixture, or base"
    )
    parser.add_argument("--device", help="where to run; on the GPU by default where there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of the weights")


def adapter_shares(flag: str, given: str, names: Sequence[str]) -> dict[str, float]:
    """How much of each adapter is wanted, of NAME or NAME=SHARE,NAME=SHARE; ValueError where that makes no sense."""
    shares: dict[str, float] = {}
    for part in given.split(","):
        name, equals, share = part.partition("=")
        if name not in names or name in shares:
            raise ValueError(f"{flag} {given}: {name!r} is not one of {', '.join(names)}, or is named twice")
        try:
            shares[name] = float(share) if equals else 1.0
        except ValueError:
            raise ValueError(f"{flag} {given}: the share {share!r} of {name} is not a number") from None
    return shares
