"""What the `.wandb` files of earlier launches hold of a run, read as `wandb sync` reads them.

A `.wandb` file is a LevelDB log: 7 bytes of header, then blocks of 32 KiB holding chunks of a checksum (4 bytes), a
length (2), a type (1: whole, 2: first, 3: middle, 4: last) and data; the data are protobuf messages `Record`. A killed
launch leaves a torn last record, at which `wandb sync` stops for ever, and with it all later files of the run.
"""

import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

HEADER_BYTES, BLOCK_BYTES, CHUNK_HEADER = 7, 32768, struct.Struct("<IHB")
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def mend_files(folder: Path, run_id: str) -> dict[int, set[str]]:
    """Cuts torn ends off the files of a run, removes offline ones that hold no run, and returns what the rest holds.

    Returns the keys of each row by its step. Nothing may be writing to the files.
    """
    rows: dict[int, set[str]] = {}
    for path in sorted(folder.glob(f"*run-*/run-{run_id}.wandb")):
        found, end, has_run = read_file(path)
        if not has_run and path.parent.name.startswith("offline-"):
            shutil.rmtree(path.parent)
            continue
        if end < path.stat().st_size:
            os.truncate(path, end)
        rows |= found
    return rows


def read_file(path: Path) -> tuple[dict[int, set[str]], int, bool]:
    """The keys of each row by step, the end of the last whole record in bytes, and whether a run is described."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows, end, has_run = {}, 0, False
    for message, position in messages(path.read_bytes()):
        end = position
        record = Record.FromString(message)
        kind = record.WhichOneof("record_type")
        has_run |= kind == "run"
        if kind == "history":
            keys = ("/".join(item.nested_key) or item.key for item in record.history.item)
            rows[record.history.step.num] = {key for key in keys if not key.startswith("_")}
    return rows, end, has_run


def messages(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Each whole message and where it ends, up to the first damage."""
    position, message = HEADER_BYTES, b""
    while data[:4] == b":W&B":
        left = BLOCK_BYTES - position % BLOCK_BYTES
        position += left if left < CHUNK_HEADER.size else 0
        if position + CHUNK_HEADER.size > len(data):
            return
        checksum, length, kind = CHUNK_HEADER.unpack_from(data, position)
        position += CHUNK_HEADER.size
        chunk = data[position : position + length]
        whole = len(chunk) == length and kind in (WHOLE, FIRST, MIDDLE, LAST)
        if not whole or zlib.crc32(chunk, zlib.crc32(bytes([kind]))) != checksum:
            return
        position += length
        message = chunk if kind in (WHOLE, FIRST) else message + chunk
        if kind in (WHOLE, LAST):
            yield message, position
