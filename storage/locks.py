"""Which process may write to a folder."""

import fcntl
import os
from pathlib import Path
from typing import IO


def lock(path: Path) -> IO[str]:
    """Lock a file, made if need be, for as long as the returned one is open and its process lives.

    Raises BlockingIOError where another holds it.
    """
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        file.close()
        raise
    return file


def still_at(path: Path, file: IO) -> bool:
    """Whether an open file is the one that this path names: neither removed, moved nor replaced."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except OSError:
        return False
