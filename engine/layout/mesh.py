"""How the ranks of a run are arranged: which of them share a batch, which compute the same, which hold another part."""

import argparse
from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import numpy as np

AXES = ("pipeline", "data", "sequence", "tensor")
"""From the ranks that exchange least, and lie furthest apart, to those that exchange most."""
PLACES = {
    "pipeline": "pipeline.stages",
    "tensor": "tensor_parallel.autotp_size",
    "sequence": "sequence_parallel_size",
}
"""Where a JSON says how many ranks an axis has."""
EXCHANGE = "sequence_parallel_exchange"
FLAGS = {"pipeline": "--pipeline_stages", "tensor": "--tensor", "sequence": "--sequence"}
"""Of a launch, for the same."""


class Mesh(NamedTuple):
    """Ranks count through the tensor group first, then sequence, data, pipeline.

    DeepSpeed's pipeline, which knows no sequence groups, orders them alike and takes their ranks for data-parallel ones.
    """

    rank: int
    world_size: int
    pipeline: int = 1
    """Ranks among which the layers are divided, consecutive ones to each."""
    tensor: int = 1
    """Ranks over which the matrices of every layer are split."""
    sequence: int = 1
    """Ranks over which the tokens of every row are split."""
    split_rows: bool = False
    """Whether the ranks of a tensor group divide the tokens between them wherever they need no matrix."""
    exchange: str = "heads"
    """What the ranks of a sequence group exchange in attention: parts of the heads, or the keys (and values) of all."""

    @property
    def data(self) -> int:
        """Groups of ranks that each take other rows."""
        return self.world_size // (self.pipeline * self.tensor * self.sequence)

    @property
    def pipeline_rank(self) -> int:
        return self.rank // (self.world_size // self.pipeline)

    @property
    def data_rank(self) -> int:
        return self.rank // (self.tensor * self.sequence) % self.data

    @property
    def sequence_rank(self) -> int:
        return self.rank // self.tensor % self.sequence

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor

    @property
    def counts(self) -> bool:
        """Whether this rank's loss sums belong in a total over all ranks, in which every token is counted once."""
        return self.pipeline_rank == self.pipeline - 1 and self.tensor_rank == 0

    def columns(self, tokens: int) -> slice:
        """Which tokens of a row of so many this rank works on, where these do not depend on the row (see `deal.py`)."""
        share = tokens // self.sequence
        return slice(self.sequence_rank * share, (self.sequence_rank + 1) * share)

    def groups_along(self, *axes: str) -> list[list[int]]:
        """All ranks in groups whose ranks differ along these axes only, in ascending order."""
        sizes = {axis: getattr(self, axis) for axis in AXES}
        inside = [number for number, axis in enumerate(AXES) if axis in axes]
        ranks = np.moveaxis(np.arange(self.world_size).reshape(*sizes.values()), inside, range(-len(inside), 0))
        return ranks.reshape(-1, prod(sizes[axis] for axis in axes)).tolist()

    def __str__(self) -> str:
        parts = {"pipeline stages": self.pipeline, "tensor": self.tensor, "sequence": self.sequence}
        words = [f"{name} {size}" for name, size in parts.items() if size > 1]
        words += ["by keys"] * (self.exchange == "keys")
        return ", ".join([f"{self.world_size} rank{'s' if self.world_size > 1 else ''}", *words])


def add_mesh_flags(parser: argparse.ArgumentParser) -> None:
    for axis, flag in FLAGS.items():
        more = f'; what they exchange says "{EXCHANGE}" of the JSON: heads or keys' if axis == "sequence" else ""
        parser.add_argument(flag, dest=axis, type=int, metavar="N", help=f"ranks of a {axis} group{more}")


def read_mesh(
    config: dict[str, Any], rank: int, world_size: int, degrees: Mapping[str, int | None]
) -> tuple[Mesh, list[str]]:
    """The arrangement that a JSON asks for on this launch, and a sentence for each reason why it cannot be.

    `degrees`: what the flags say of an axis. The degrees are written into the JSON: a flag's where it has none or "auto"; all
    ranks that the other axes leave for the one axis that is "auto" without a flag.
    """
    problems, sizes, open_axes = [], {}, []
    for axis, place in PLACES.items():
        flag, given = degrees.get(axis), FLAGS[axis]
        value = _read(config, axis)
        if value in ("auto", None) and flag is not None:
            value = flag
        elif flag is not None and value != flag:
            problems.append(f'{place} is {value!r} but {given} is {flag}: make them equal or "auto"')
        if value == "auto":
            open_axes.append(axis)
        elif isinstance(value, bool) or not isinstance(value, int | None) or (value is not None and value < 1):
            problems.append(f"{place if flag is None else given} must be a whole number above 0, got {value!r}")
        sizes[axis] = value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 1
    if len(open_axes) > 1:
        places = " and ".join(PLACES[axis] for axis in open_axes)
        flags = " and ".join(f"{FLAGS[axis]} N" for axis in open_axes)
        problems.append(f'{places} are both "auto": start with {flags}')
    elif open_axes:
        sizes[open_axes[0]] = max(1, world_size // prod(sizes.values()))
    if world_size % prod(sizes.values()):
        problems.append(_does_not_divide(sizes, world_size))
        sizes = dict.fromkeys(sizes, 1)
    for axis, size in sizes.items():
        _write(config, axis, size)
    split_rows = sizes["tensor"] > 1 and config["tensor_parallel"].get("split_rows") is True
    by_keys = sizes["sequence"] > 1 and config.get(EXCHANGE) == "keys"
    return Mesh(rank, world_size, **sizes, split_rows=split_rows, exchange="keys" if by_keys else "heads"), problems


def _read(config: dict[str, Any], axis: str) -> Any:
    """What the JSON says of an axis; None: nothing. A pipeline without a number of stages has all ranks that are left."""
    section, _, key = PLACES[axis].rpartition(".")
    if not section:
        return config.get(key)
    if not isinstance(config.get(section), dict):
        return None
    return config[section].get(key, "auto" if axis == "pipeline" else None)


def _write(config: dict[str, Any], axis: str, size: int) -> None:
    section, _, key = PLACES[axis].rpartition(".")
    holder = config.get(section) if section else config
    if size == 1 and not (isinstance(holder, dict) and (key in holder or axis == "pipeline")):
        return
    if holder is None:
        holder = config[section] = {}
    holder[key] = size
    if axis == "pipeline":
        holder.setdefault("partition", "flops")


def _does_not_divide(sizes: dict[str, int], world_size: int) -> str:
    used = {axis: size for axis, size in sizes.items() if size > 1}
    words = " x ".join(f"{PLACES[axis]} {size}" for axis, size in used.items())
    product = prod(used.values())
    equals = f" = {product}" if len(used) > 1 else ""
    divisors = [n for n in range(2, world_size + 1) if world_size % n == 0]
    remedy = f"use {' or '.join(map(str, divisors[:4]))}" if divisors else f"start at least {product} processes"
    if len(used) > 1 and divisors:
        remedy = f"start a multiple of {product} ranks, or use smaller degrees"
    ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
    return f"{words}{equals} does not divide the {ranks} of this launch: {remedy}"
