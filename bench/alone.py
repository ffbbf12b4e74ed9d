"""A contender of a bench in a process of its own, so that its memory and CPU time are its own too."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from console.command import CommandParser

Figures = dict[str, Any]
"""What a contender took and made, JSON-able."""


def run_alone(bench: str, folder: Path, name: str, megabytes: int = 0) -> Figures:
    """The figures of a contender of this module, or of `prepare`."""
    command = [sys.executable, "-m", bench, "--run", str(folder), name, "--megabytes", str(megabytes)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def megabytes_or_run(
    bench: str,
    description: str | None,
    megabytes: int,
    prepare: Callable[[Path, int], Figures],
    contenders: Mapping[str, Callable[[Path], Figures]],
) -> int | None:
    """The size of the text to measure with; None where this process was to be one contender, which it then was."""
    parser = CommandParser(prog=f"python -m {bench}")
    parser.description = description
    parser.add_argument("--megabytes", type=int, default=megabytes, help="size of the text (default: %(default)s)")
    parser.add_argument("--run", nargs=2, metavar=("FOLDER", "CONTENDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.run:
        return arguments.megabytes
    folder, name = Path(arguments.run[0]), arguments.run[1]
    print(json.dumps(prepare(folder, arguments.megabytes) if name == "prepare" else contenders[name](folder)))
    return None
