"""What every command of this package does the same way: one sentence for bad input, no traceback, exit code 2.

Imports only the standard library, so that `end_at_ctrl_c` is in charge before anything slow is imported.
"""

import argparse
import difflib
import errno
import io
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

OTHERS_FIRST_SECONDS = 10.0
INTERRUPTED = "interrupted: run the same command again to continue"

DISK_ERRORS = {
    errno.ENOSPC: "no space is left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file size limit is reached",
}


def end_at_ctrl_c() -> None:
    """Until `run_command` takes over, Ctrl-C ends the process as it does then; a command calls this above its imports."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a background job's ignored one stays ignored
        signal.signal(signal.SIGINT, _end_import)


def _end_import(number: int, frame: FrameType | None) -> None:
    """Nothing is open yet, and an exception could be swallowed or turned into another by the library being imported."""
    os.write(sys.stderr.fileno(), f"{INTERRUPTED}\n".encode())
    os._exit(130)


def run_command(command: Callable[[], None]) -> None:
    """Run `command` and end the process: 0 after success, 2 after bad input, 130 after Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):  # a file's name need not be UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        if signal.getsignal(signal.SIGINT) is _end_import:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        command()
        sys.stdout.flush()
        status = 0
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        status = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except (ValueError, OSError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        status = 2
    sys.exit(status)


def sentence(error: Exception) -> str:
    """The error in one line; a full disk in words of its own, whichever library met it."""
    if not isinstance(error, OSError):
        return " ".join(str(error).split())
    for number, words in DISK_ERRORS.items():
        if error.errno == number or os.strerror(number) in str(error):
            where = f" while writing {error.filename}" if error.filename else ""
            return f"{words}{where}: make room and run the same command again"
    if error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


class DefaultsInHelp(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Names a default where there is one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default not in (None, False) else action.help


def no_url(text: str) -> str:
    """Of a path on this machine; not the folder `s3:` that a URL would name."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        raise argparse.ArgumentTypeError(
            f"{text} is a URL, where a path on this machine is needed: `python -m tools.pull {text} FOLDER` fetches a data set "
            "or a checkpoint (--on-demand: shards as they are read), `python -m tools.push` sends one"
        )
    return text


class CommandParser(argparse.ArgumentParser):
    """Says what is wrong with a command line in a sentence a mistake, each flag with the nearest known one.

    Of many ranks with the same command line only the first speaks. Flags are never abbreviated: a later flag would change
    what an abbreviation means. `hints`: sentences for flags that are expected by users of other programs.
    """

    def __init__(self, *, hints: dict[str, str] | None = None, **settings: Any) -> None:
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **settings)
        self.register("type", Path, lambda text: Path(no_url(text)))
        self.hints = hints or {}

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        words = sys.argv[1:] if args is None else list(args)
        if self._subparsers is None:  # else each command has a parser of its own
            words_of_flags = words[: words.index("--")] if "--" in words else words
            flags = dict.fromkeys(word.partition("=")[0] for word in words_of_flags if word.startswith("--"))
            if unknown := [flag for flag in flags if flag not in self._option_string_actions]:
                self.error("\n".join(self._unknown(flag) for flag in unknown))
        return super().parse_known_args(words, namespace)

    def _unknown(self, flag: str) -> str:
        if hint := self.hints.get(flag):
            return f"unknown flag {flag}: {hint}"
        known = [name for name in self._option_string_actions if name.startswith("--")]
        section = flag.partition(".")[0]
        if "." in flag and (of_section := [name for name in known if name.startswith(f"{section}.")]):
            near = difflib.get_close_matches(flag, of_section, n=1, cutoff=0.6)
            listed = ", ".join(of_section)
            return f"unknown flag {flag}; did you mean {near[0]}?" if near else f"unknown flag {flag}; known: {listed}"
        near = difflib.get_close_matches(flag, known, n=1, cutoff=0.6)
        return f"unknown flag {flag}; did you mean {near[0]}?" if near else f"unknown flag {flag} (--help lists all)"

    def error(self, message: str) -> NoReturn:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(OTHERS_FIRST_SECONDS)  # the launcher ends this rank when the first one has spoken
            sys.exit(2)
        for line in message.splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
