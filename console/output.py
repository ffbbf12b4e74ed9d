"""Standard output and error of a process that has more to lose than what it prints."""

import io
import sys
from typing import Any


class Output(io.FileIO):
    """Standard output or error; a terminal, pipe or disk that no longer takes it ends no run."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def outlive_readers() -> None:
    """Let what is printed be lost once nobody can take it, instead of raising in the middle of a step or a save."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        if (stream := getattr(sys, name)) is not None:  # closed from the beginning: nothing is printed
            buffer = io.BufferedWriter(Output(number, "w", closefd=False))
            encoding = {"encoding": stream.encoding, "errors": stream.errors}
            setattr(sys, name, io.TextIOWrapper(buffer, line_buffering=True, **encoding))
