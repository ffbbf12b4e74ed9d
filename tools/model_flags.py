"""Flags of the commands that open what training made (see `tools.trained`)."""

import argparse

DTYPES = ("float32", "bfloat16", "float16")
"""Names that torch knows."""


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="folder of a run, or an exported Hugging Face folder")
    parser.add_argument("--step", type=int, help="checkpoint of a run; the newest good one by default")
    parser.add_argument("--device", help="where to run; on the GPU by default where there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of the weights")
