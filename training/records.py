"""`metrics.jsonl`: one JSON object a line, appended while the run goes on, read by the report and by anything else.

A record is one of three: metrics of a step, `{"step", "validation": {...}}`, or `{"step", "event": name, ...}`. Each is
written by one system call, so a kill at any moment costs at most the last line; opening for append removes such a torn
line together with the records of steps that will be done again.
"""

import errno
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from storage.atomic import publish
from storage.locks import still_at


class RecordFile:
    """Appends records to a file that a run continues from `resumed_step` (0: from the beginning)."""

    def __init__(self, path: Path, resumed_step: int) -> None:
        drop_records_after(path, resumed_step)
        self._path, self._file = path, path.open("ab", buffering=0)
        self._waiting: list[bytes] = []
        """Lines for which there was no room: on a full disk a run goes on, since room may come back."""

    def write(self, record: dict[str, Any]) -> None:
        """Raises ValueError when the file is no longer at its path, or cannot take it for another reason than room."""
        self._waiting.append(json.dumps(finite(record), allow_nan=False).encode() + b"\n")
        self._write_waiting(but=(errno.ENOSPC, errno.EDQUOT))

    def _write_waiting(self, but: tuple[int, ...] = ()) -> None:
        try:
            if not still_at(self._path, self._file):
                raise FileNotFoundError
            while self._waiting:
                self._append(self._waiting[0])
                self._waiting.pop(0)
        except FileNotFoundError:
            raise ValueError(
                f"{self._path} was removed, moved or replaced while training wrote to it: put its folder back and run the "
                "same command again"
            ) from None
        except OSError as error:
            if error.errno in but:
                return
            raise ValueError(
                f"{self._path} cannot be written ({error.strerror}): make room or mend the file system and run the same "
                "command again"
            ) from None

    def go_back(self, step: int) -> None:
        """Remove the records of later steps."""
        self._waiting = [line for line in self._waiting if json.loads(line)["step"] <= step]
        self._file.close()
        drop_records_after(self._path, step)
        self._file = self._path.open("ab", buffering=0)

    def _append(self, line: bytes) -> None:
        size = os.fstat(self._file.fileno()).st_size
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError:
            self._file.truncate(size)  # half a line would damage the file for those after it
            raise

    def close(self, exit_code: int) -> None:
        """Raises ValueError where lines are still without room, unless something else ends the run."""
        if self._waiting:
            self._write_waiting(but=(errno.ENOSPC, errno.EDQUOT) if exit_code else ())
        os.fsync(self._file.fileno())
        self._file.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """All records in order, without a last line that is still being written or was torn by a kill.

    Raises ValueError where any other line is damaged.
    """
    return [record for record, _ in _parsed_lines(path)]


def drop_records_after(path: Path, step: int) -> None:
    """Removes the records of later steps and a torn last line, in one rename; after step 0 nothing is kept."""
    if not path.exists():
        return
    kept = [line for record, line in _parsed_lines(path) if 0 < step >= record["step"]]
    if sum(map(len, kept)) == path.stat().st_size:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    publish(temporary, path)


def finite(value: Any) -> Any:
    """The value with NaN and infinities, which JSON does not have, as None."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parsed_lines(path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            intact = line.endswith(b"\n") and isinstance(record, dict) and isinstance(record.get("step"), int)
        except ValueError:
            intact = False
        if intact:
            yield record, line
        elif number < len(lines):
            raise ValueError(f"{path}:{number}: not a record of a training run; repair or remove this line")
