"""Which process may write to a folder."""

import fcntl
import os
from pathlib import Path
from typing import IO


def lock(path: Path, shared: bool = False, wait: bool = False) -> IO[str]:
    """Lock a file, made if need be, for as long as the returned one is open and its process lives: alone, or `shared` with
    others that do the same.

    Raises BlockingIOError where another holds it, unless told to `wait`.
    """
    file = path.open("a+")
    try:
        relock(file, shared, wait)
    except BaseException:
        file.close()
        raise
    return file


def relock(file: IO[str], shared: bool, wait: bool = False) -> None:
    """Hold a locked file the other way from now on; another process may get between. Raises BlockingIOError."""
    fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))


def still_at(path: Path, file: IO) -> bool:
    """Whether an open file is the one that this path names: neither removed, moved nor replaced."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except OSError:
        return False
