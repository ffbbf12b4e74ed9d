"""Read DeepSpeed's own checkpoint files in pieces, whatever the ZeRO stage, without DeepSpeed.

How the states lie cut over the files says `engine.checkpoint.division`; a pipeline has a set of files for every stage, tensor
parallelism one for every rank of its group. Only the bytes that somebody asks for are read, through one small buffer, and
they are counted.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engine.checkpoint.division import Box, Division, PartDivision, Read, Shapes, Slice
from engine.checkpoint.manifest import CheckpointManifest
from engine.layout.names import plan_name
from engine.layout.slices import cut_dimensions
from engine.safe_load import load_index, position_of
from model.config import ModelConfig
from training.sections import OptimizerConfig

BUFFER_BYTES = 1 << 24
OPEN_FILES = 64
ABSENT = -1
"""Position of a moment that the optimizer does not keep of a parameter."""


class Vector(NamedTuple):
    """A tensor in a file, flattened."""

    position: int
    numel: int
    dtype: torch.dtype


class RankStates(NamedTuple):
    """What one file of a source's rank has: by key ("weight", a moment) and group the vectors, one after another."""

    path: Path
    vectors: dict[str, list[list[Vector]]]
    steps: list[int]
    """Updates that the moments have seen; at stage 0 of each parameter."""


class CheckpointFiles:
    """A checkpoint that has been checked before (`engine.checkpoint.folder`): only files that its manifest names are opened."""

    def __init__(self, folder: Path, manifest: CheckpointManifest) -> None:
        self.folder, self.manifest = folder, manifest
        self.bytes_read = 0
        """Of weights and moments, so far."""
        self._config = ModelConfig.model_validate(manifest.recipe["model"])
        self._moments = OptimizerConfig.model_validate(manifest.recipe["optimizer"]).moments
        self._contents: dict[tuple[int, int], RankStates] = {}
        self._paths = [self._optimizer_files(part) for part in range(manifest.layout.parts)]
        parts = [self._part_division(part) for part in range(manifest.layout.parts)]
        self.division = Division(parts, manifest.layout.tensor, cut_dimensions(self._config))
        self._buffer = bytearray(BUFFER_BYTES)
        self._open: dict[Path, int] = {}

    def __enter__(self) -> "CheckpointFiles":
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def moments(self, name: str) -> tuple[str, ...]:
        """Those that the checkpoint has of this parameter (under Muon a parameter has some)."""
        content, group = self._first(name)
        place = self.division.parts[self.division.first_parts[name]].places[name][1]
        stage_3 = self.manifest.layout.zero_stage == 3
        return tuple(
            key
            for key in self._moments
            if _at(content.vectors[key][group], place if stage_3 else 0)[0].position != ABSENT
        )

    def step(self, name: str) -> int:
        """Updates that the moments of a parameter have seen."""
        content, group = self._first(name)
        return content.steps[group if self.manifest.layout.zero_stage == 0 else 0]

    def read(self, name: str, key: str, piece: Slice, wanted: range, into: torch.Tensor, offset: int = 0) -> None:
        """Copy elements `wanted` of a slice of a parameter (or of a moment of it) to the same elements of `into`, [N].

        `offset`: where in `into` the first of them goes.
        """
        for read in self.division.reads(name, piece, wanted):
            self._copy(read, key, into, offset - wanted.start)

    def read_whole(self, name: str, key: str = "weight") -> torch.Tensor:
        """A whole parameter, or a moment of it."""
        shape, (content, group) = self.division.shapes[name], self._first(name)
        whole = torch.empty(shape, dtype=content.vectors[key][group][0].dtype)
        self.read(name, key, self.division.slice(name, 0, 1), range(whole.numel()), whole.view(-1))
        return whole

    def _first(self, name: str) -> tuple[RankStates, int]:
        """The first file that may have a parameter, and its group there."""
        part = self.division.first_parts[name]
        return self._content(part, 0), self.division.parts[part].places[name][0]

    def _copy(self, read: Read, key: str, into: torch.Tensor, shift: int) -> None:
        content = self._content(read.part, read.rank)
        vector, start = _at(content.vectors[key][read.group], read.box.source)
        box, size = read.box._replace(source=start, target=read.box.target + shift), vector.dtype.itemsize
        across = min(box.width, BUFFER_BYTES // size)
        down = max(BUFFER_BYTES // size // across, 1)
        for column in range(0, box.width, across):
            for row in range(0, box.rows, down):
                self._copy_block(content.path, vector, _within(box, row, down, column, across), into)

    def _copy_block(self, path: Path, vector: Vector, box: Box, into: torch.Tensor) -> None:
        size, count = vector.dtype.itemsize, box.rows * box.width
        runs, length = (1, count) if box.source_stride == box.width else (box.rows, box.width)
        memory = memoryview(self._buffer)
        for run in range(runs):
            place = vector.position + (box.source + run * box.source_stride) * size
            self._fill(path, place, memory[run * length * size :][: length * size])
        values = torch.frombuffer(self._buffer, dtype=vector.dtype, count=count).view(box.rows, box.width)
        span = (box.rows - 1) * box.target_stride + box.width
        target = into.narrow(0, box.target, span).as_strided(values.shape, (box.target_stride, 1))
        target.copy_(values)
        self.bytes_read += count * size

    def _fill(self, path: Path, position: int, memory: memoryview) -> None:
        if path not in self._open:
            if len(self._open) == OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[path] = os.open(path, os.O_RDONLY)
        while memory:
            if not (got := os.preadv(self._open[path], [memory], position)):
                raise ValueError(f"{path}: ends before what its index names: restore it")
            position, memory = position + got, memory[got:]

    def _content(self, part: int, rank: int) -> RankStates:
        if (part, rank) not in self._contents:
            stage_0 = self.manifest.layout.zero_stage == 0
            self._contents[part, rank] = self._content_0(part) if stage_0 else self._content_of_rank(part, rank)
        return self._contents[part, rank]

    def _content_0(self, part: int) -> RankStates:
        path = self.folder / f"mp_rank_{part:02d}_model_states.pt"
        content = load_index(path)
        states = [content["optimizer"]["state"].get(i, {}) for i, _ in enumerate(self.manifest.parameters)]
        weights = [content["module"][name] for name in self.manifest.parameters]
        vectors = {"weight": [[_vector(weight)] for weight in weights]}
        for key in self._moments:
            pairs = zip(states, vectors["weight"], strict=True)
            vectors[key] = [[_moment(state.get(key), weight)] for state, (weight,) in pairs]
        return RankStates(path, vectors, [_number(path, state.get("step", 0)) for state in states])

    def _content_of_rank(self, part: int, rank: int) -> RankStates:
        path = self._paths[part][rank]
        content = load_index(path)["optimizer_state_dict"]
        weights = content.get("fp32_flat_groups") or content["single_partition_of_fp32_groups"]
        states = (content.get("optimizer_state_dict") or content["base_optimizer_state"])["state"]
        vectors = {"weight": [_vector(tensor) for tensor in weights]}
        of_vectors = [states[i] for i in sorted(states)] or [{}] * len(weights)  # none before the first update
        for key in self._moments:
            pairs = zip(of_vectors, vectors["weight"], strict=True)
            vectors[key] = [_moment(state.get(key), weight) for state, weight in pairs]
        stage_3 = self.manifest.layout.zero_stage == 3  # whose groups are divided again
        grouped = {key: [of_key] if stage_3 else [[one] for one in of_key] for key, of_key in vectors.items()}
        return RankStates(path, grouped, [_number(path, states[0]["step"]) if states else 0])

    def _part_division(self, part: int) -> PartDivision:
        stage, ranks = self.manifest.layout.zero_stage, len(self._paths[part])
        if stage == 0:
            module = load_index(self.folder / f"mp_rank_{part:02d}_model_states.pt")["module"]
            return PartDivision(0, 1, [self._named({name: module[name].shape for name in self.manifest.parameters})])
        prefix = "zero_pp_rank_0_" if stage == 3 else ""
        shapes = load_index(self.folder / f"{prefix}mp_rank_{part:02d}_model_states.pt")["param_shapes"]
        groups = [self._named(group) for group in shapes]
        if stage == 3:
            return PartDivision(3, ranks, groups)
        sizes = [vectors[0].numel for vectors in self._content(part, 0).vectors["weight"]]
        paddings = load_index(self._paths[part][0])["optimizer_state_dict"].get("param_alignment_paddings")
        return PartDivision(stage, ranks, groups, sizes, paddings)

    def _named(self, shapes: dict[str, torch.Size]) -> Shapes:
        return {plan_name(name, self._config): tuple(shape) for name, shape in shapes.items()}

    def _optimizer_files(self, part: int) -> list[Path]:
        """Those that the manifest names, in the order of their ranks; whatever else lies in the folder is not read."""
        pattern = re.compile(rf"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_{part:02d}_optim_states\.pt")
        names = self.manifest.files
        ranks = {int(found[1]): self.folder / name for name in names if (found := pattern.fullmatch(name))}
        return [ranks[rank] for rank in sorted(ranks)]


def read_weights(folder: Path, manifest: CheckpointManifest) -> Iterator[tuple[str, torch.Tensor]]:
    """Names in the layer plan and whole tensors, float32 wherever the checkpoint has float32, one at a time."""
    with CheckpointFiles(folder, manifest) as files:
        for name in files.division.first_parts:
            yield name, files.read_whole(name)


def _vector(tensor: torch.Tensor) -> Vector:
    return Vector(position_of(tensor), tensor.numel(), tensor.dtype)


def _moment(tensor: torch.Tensor | None, weight: Vector) -> Vector:
    return weight._replace(position=ABSENT) if tensor is None else _vector(tensor)


def _at(vectors: list[Vector], place: int) -> tuple[Vector, int]:
    """Which of several vectors, one after another, has an element, and where."""
    for vector in vectors:
        if place < vector.numel:
            break
        place -= vector.numel
    return vector, place


def _number(path: Path, value: Any) -> int:
    """A count that a file has as a number or as a tensor of one."""
    if not isinstance(value, torch.Tensor):
        return int(value)
    with path.open("rb") as file:
        file.seek(position_of(value))
        return int(torch.frombuffer(bytearray(file.read(value.element_size())), dtype=value.dtype)[0])


def _within(box: Box, row: int, rows: int, column: int, columns: int) -> Box:
    source, target = (
        start + row * stride + column
        for start, stride in ((box.source, box.source_stride), (box.target, box.target_stride))
    )
    size = min(rows, box.rows - row), min(columns, box.width - column)
    return Box(source, box.source_stride, target, box.target_stride, *size)
