"""A file by memory map, which is not used once it is another."""

import time
from pathlib import Path

import pyarrow as pa

from storage.rows import row_block

LOOK_SECONDS = 0.02
"""Between two looks at a mapped file, which may cost a request to a file server."""
RESTORE = "restore it, check the data with `python -m data_prep.verify`, and run the same command again"


class MappedStream:
    """The record batches of an Arrow stream, as long as its file is the one that was mapped."""

    def __init__(self, path: Path, may_go: bool = False) -> None:
        """`may_go`: the file may be taken away, which leaves what is mapped as it is. Raises OSError, ArrowException."""
        self.path, self._status = path, path.stat()
        self.good_until = float("inf") if may_go else 0.0
        self.schema, self.batches = map_stream(path)
        self.rows = sum(batch.num_rows for batch in self.batches)

    def look(self) -> None:
        """Raises ValueError when the file changed."""
        try:
            now, before = self.path.stat(), self._status
        except OSError as error:
            raise ValueError(f"{self.path} can no longer be read ({error.strerror}): {RESTORE}") from None
        if (lost := before.st_size - now.st_size) > 0:
            raise ValueError(f"{self.path} has lost {lost} bytes since it was opened: {RESTORE}")
        fields = ("st_dev", "st_ino", "st_size", "st_mtime_ns")
        if any(getattr(now, field) != getattr(before, field) for field in fields):
            raise ValueError(f"{self.path} was replaced or written to since it was opened: {RESTORE}")
        self.good_until = time.monotonic() + LOOK_SECONDS


class MappedShard(MappedStream):
    """The rows of a shard."""

    def __init__(self, path: Path, may_go: bool = False) -> None:
        super().__init__(path, may_go)
        self.blocks = [row_block(batch) for batch in self.batches]


def map_stream(path: Path) -> tuple[pa.Schema, list[pa.RecordBatch]]:
    """Schema and record batches of a file, as views of its map."""
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as stream:
        return stream.schema, list(stream)
