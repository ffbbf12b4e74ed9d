"""Counts the bytes of the tensors that live, real or fake."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that tensor operations make while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def leave_out(self, *tensors: Tensor) -> None:
        """Do not count what these lie in, or views of it."""
        for tensor in tensors:
            self._known.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            return self._count(found)
        return tree_map_only(Tensor, self._count, found) if isinstance(found, tuple | list) else found

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage not in self._known:
            self._known.add(storage)
            size = storage.nbytes()
            weakref.finalize(storage, self._gone, size)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
        return tensor

    def _gone(self, size: int) -> None:
        self.bytes -= size
