"""One thread of gloo in a process that makes group after group: each would bring one that wakes a hundred times a second.

DeepSpeed's engines at stage 3 are never freed, nor are their groups, so ranks that answer many calls would be slowed down
more and more.
"""

import functools
from datetime import timedelta

from torch.distributed import ProcessGroupGloo, Store, distributed_c10d


class _OnOneDevice(ProcessGroupGloo):
    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        options = ProcessGroupGloo._Options()
        options._devices, options._threads, options._timeout = [_device()], 2, timeout
        super().__init__(store, rank, size, options)


@functools.cache
def _device() -> ProcessGroupGloo.Device:
    return ProcessGroupGloo.create_default_device()


def share_device() -> None:
    """Between all groups that this process makes from here on."""
    distributed_c10d.ProcessGroupGloo = _OnOneDevice
