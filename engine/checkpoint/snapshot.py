"""What DeepSpeed would write, taken from it file by file: written at once, or copied to host memory and written later.

The copy is of storages, as `torch.save` lays them out, with the index that goes before them; so the bytes that are written
from it are those that `torch.save` would have written at the moment of the copy, whatever happens to the weights since.
"""

import errno
import os
import pickle
import types
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from torch.utils.serialization import config

Buffers = dict[tuple[str, str], torch.UntypedStorage]
"""Of a file's name and a record's: host memory that every snapshot uses anew, since fresh memory takes several times as
long to copy to."""


class FileContent(NamedTuple):
    """All of a file that is to be written."""

    path: Path
    records: list[tuple[str, Any, int]]
    """Name, data and size in bytes."""

    @property
    def bytes(self) -> int:
        return sum(size for _, _, size in self.records)

    def write(self) -> None:
        with torch.serialization._open_zipfile_writer(str(self.path)) as file:
            for record in self.records:
                file.write_record(*record)


def content_of(state: Any, path: Path, buffers: Buffers) -> FileContent:
    """What `torch.save(state, path)` would write now."""
    recorder = _Recorder(path, buffers)
    with config.patch("save.use_pinned_memory_for_d2h", True):  # type: ignore[attr-defined]  # a torch ConfigModule
        torch.serialization._save(state, recorder, recorder.pickle, torch.serialization.DEFAULT_PROTOCOL, False)
    return recorder.content


class _Recorder:
    """Takes the place of torch's writer of zip files."""

    def __init__(self, path: Path, buffers: Buffers) -> None:
        self.content = FileContent(path, [])
        self._buffers = buffers
        held = self._held = set[int]()

        class Pickler(pickle.Pickler):
            """Notes which storages are the training's own, and not copies that torch made of what a device holds."""

            def reducer_override(self, thing: Any) -> Any:
                if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
                    held.add(thing.untyped_storage().data_ptr())
                return NotImplemented

        self.pickle = types.SimpleNamespace(Pickler=Pickler)

    def write_record(self, name: str, data: Any, size: int) -> None:
        if isinstance(data, torch.UntypedStorage) and data.data_ptr() in self._held:
            key = self.content.path.name, name
            if key not in self._buffers or self._buffers[key].nbytes() != size:
                self._buffers[key] = torch.UntypedStorage(size)
            data = self._buffers[key].copy_(data)
        self.content.records.append((name, data, size))


class SavedFiles(CheckpointEngine):
    """Takes the place of DeepSpeed's checkpoint engine during a save.

    `buffers`: where a snapshot goes, or None if every file is to be written at once. An error of the file system ends no
    call: the other ranks are in the same collectives. It is kept in `error`.
    """

    def __init__(self, buffers: Buffers | None) -> None:
        super().__init__()
        self._buffers = buffers
        self.paths: list[Path] = []
        self.error: OSError | RuntimeError | None = None
        self._waiting: list[FileContent] = []

    @property
    def bytes(self) -> int:
        """Copied and not yet written."""
        return sum(content.bytes for content in self._waiting)

    def save(self, state_dict: Any, path: str | Path) -> None:
        self.paths.append(Path(path))
        if self._buffers is not None:
            self._waiting.append(content_of(state_dict, Path(path), self._buffers))
        elif self.error is None:
            try:
                _make_folder(Path(path).parent)
                torch.save(state_dict, path)
            except (OSError, RuntimeError) as error:
                self.error = error

    def write(self) -> None:
        """Write what was copied. Raises OSError, or the RuntimeErrors of torch, where the file system refuses now or did."""
        if self.error:
            raise self.error
        while self._waiting:
            content = self._waiting.pop(0)
            _make_folder(content.path.parent)
            content.write()

    def check_room(self, needed: float, free: float) -> None:
        """Have `write` fail before it has written anything where these bytes, of all ranks, are more than are free."""
        if needed > free:
            words = f"{os.strerror(errno.ENOSPC)}: it needs {needed / 1e9:,.3f} GB and {free / 1e9:,.3f} GB are free"
            self.error = OSError(errno.ENOSPC, words)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Folders are made with their first file."""

    def create(self, info: Any) -> None:
        """Nothing to prepare."""

    def commit(self, info: Any) -> bool:
        return True

    def load(self, path: str, map_location: Any = None) -> Any:
        raise NotImplementedError("only for saves")


def _make_folder(folder: Path) -> None:
    """And that of all checkpoints; a run that was taken away is not made anew."""
    folder.parent.mkdir(exist_ok=True)
    folder.mkdir(exist_ok=True)
