"""Commands called within the process of the test."""

import sys
from collections.abc import Callable
from typing import NamedTuple

from console.command import run_command


class Called(NamedTuple):
    code: int
    out: str
    err: str


def call(main: Callable[[], None], capsys, monkeypatch, *arguments) -> Called:
    """A command's main function with its command line, as its `__main__` block runs it."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    capsys.readouterr()
    try:
        run_command(main)
    except SystemExit as end:
        return Called(end.code, *capsys.readouterr())
    raise AssertionError("run_command returned")
