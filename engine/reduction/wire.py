"""Counts what this process hands to collective and point-to-point calls, at the calls themselves.

Every such call of `torch.distributed`, whoever makes it (DeepSpeed through `deepspeed.comm`, a hook of the backward pass,
this project), ends in a method of a `ProcessGroup`. `WireBytes` stands in front of these methods while it is open; before
and after, nothing is slower for it. Functional collectives, as in compiled graphs, go past them and are not seen.

A byte counted here is a byte of payload: the tensors that this rank hands in, at the width they are handed in. What it
only receives is not counted (it is counted where it comes from), nor what a backend adds, sends twice or keeps: a ring
all-reduce over n ranks sends each byte 2 (n - 1) / n times. `ring_bytes` has these factors in, so that calls of different
kinds can be added up fairly: an all-gather is handed 1 / n of what the reduce-scatter before it was, and sends as much.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.distributed import ProcessGroup

from engine import internals

OPERATIONS = {
    "all_reduce": ("allreduce", "allreduce_coalesced"),
    "all_gather": (
        "allgather",
        "allgather_coalesced",
        "allgather_into_tensor_coalesced",
        "_allgather_base",
        "all_gather_single",
        "all_gather_single_coalesced",
    ),
    "reduce_scatter": (
        "reduce_scatter",
        "reduce_scatter_tensor_coalesced",
        "_reduce_scatter_base",
        "reduce_scatter_single",
        "reduce_scatter_single_coalesced",
    ),
    "all_to_all": ("alltoall", "alltoall_base", "all_to_all_single"),
    "broadcast": ("broadcast",),
    "reduce": ("reduce",),
    "gather": ("gather",),
    "scatter": ("scatter",),
    "send": ("send",),
}
TAKES_OUTPUT_FIRST = {"all_gather", "reduce_scatter", "all_to_all", "gather", "scatter"}
RING_FACTORS = {
    "all_reduce": lambda ranks: 2 * (ranks - 1) / ranks,
    "all_gather": lambda ranks: ranks - 1,
    "reduce_scatter": lambda ranks: (ranks - 1) / ranks,
    "all_to_all": lambda ranks: (ranks - 1) / ranks,
    "scatter": lambda ranks: (ranks - 1) / ranks,
}
"""Times that a byte handed in leaves this rank in a bandwidth-optimal algorithm on so many ranks; once if not named."""


@dataclass
class Traffic:
    """One kind of call."""

    calls: int = 0
    bytes: int = 0
    """Payload handed in by this rank."""
    ring_bytes: float = 0.0
    """What leaves this rank for it in a bandwidth-optimal algorithm."""


class WireBytes:
    """Counts while it is open: `with WireBytes() as wire: ...`, then `wire.total` and `wire.by_operation`.

    All threads of this process are counted together. May be opened inside another one; both count.
    """

    def __init__(self) -> None:
        self.by_operation: dict[str, Traffic] = {}
        self._originals: dict[str, Any] = {}

    @property
    def total(self) -> int:
        """Bytes of payload that this rank handed in."""
        return sum(traffic.bytes for traffic in self.by_operation.values())

    @property
    def ring_total(self) -> float:
        return sum(traffic.ring_bytes for traffic in self.by_operation.values())

    def __enter__(self) -> Self:
        for operation, methods in OPERATIONS.items():
            for method in methods:
                if method in vars(ProcessGroup):  # some are new or old names of others
                    self._originals[method] = vars(ProcessGroup)[method]
                    counted = self._counted(operation, getattr(ProcessGroup, method))
                    internals.replace_collective(method, counted)
        return self

    def __exit__(self, *_: object) -> None:
        for method, original in self._originals.items():
            internals.replace_collective(method, original)
        self._originals.clear()

    def _counted(self, operation: str, original: Any) -> Any:
        def call(group: ProcessGroup, *arguments: Any, **options: Any) -> Any:
            self._count(operation, group, arguments)
            return original(group, *arguments, **options)

        return call

    def _count(self, operation: str, group: ProcessGroup, arguments: tuple) -> None:
        payload = _bytes(arguments[1 if operation in TAKES_OUTPUT_FIRST else 0])
        if operation == "broadcast" and arguments[1].rootRank != group.rank():
            payload = 0
        traffic = self.by_operation.setdefault(operation, Traffic())
        traffic.calls += 1
        traffic.bytes += payload
        leaving = RING_FACTORS.get(operation, lambda ranks: 1)(group.size())
        if operation == "all_to_all" and len(arguments) > 3 and sum(parts := arguments[3]):  # of unequal parts
            leaving = 1 - parts[group.rank()] / sum(parts)
        traffic.ring_bytes += payload * leaving


def _bytes(tensors: torch.Tensor | list) -> int:
    if isinstance(tensors, torch.Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(tensor) for tensor in tensors)
