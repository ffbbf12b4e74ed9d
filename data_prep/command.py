"""What every command of this package does the same way: one sentence for bad input, no traceback, exit code 2."""

import errno
import os
import sys
from collections.abc import Callable

DISK_ERRORS = {
    errno.ENOSPC: "no space is left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file size limit is reached",
}


def run_command(command: Callable[[], None]) -> None:
    """Run `command` and end the process: 0 after success, 2 after bad input, 130 after Ctrl-C."""
    try:
        command()
        sys.stdout.flush()
        status = 0
    except KeyboardInterrupt:
        print("interrupted: run the same command again to continue", file=sys.stderr)
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
