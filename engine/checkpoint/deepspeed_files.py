"""Read DeepSpeed's own checkpoint files one parameter at a time, whatever the ZeRO stage, without DeepSpeed.

The float32 master weights and the optimizer's moments lie cut in the same way:

    stage 0      whole, on the first rank
    stage 1, 2   the parameters of a group stand one after another in one vector, which is cut evenly over the ranks
    stage 3      every parameter by itself is cut evenly (rounded up) over the ranks; each rank keeps its pieces in order

A pipeline has such a set of files for every stage, tensor parallelism one for every rank of its group (with slices of the
matrices). The files are memory-mapped, so a parameter costs its own size however large the checkpoint is.
"""

import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from engine.checkpoint.manifest import CheckpointManifest
from engine.layout.names import plan_name
from engine.layout.slices import cut_dimensions, join
from engine.safe_load import load_file
from model.config import ModelConfig
from training.sections import OptimizerConfig


class ParameterState(NamedTuple):
    name: str
    weight: torch.Tensor
    """The whole parameter, float32 wherever the checkpoint has float32."""
    moments: dict[str, torch.Tensor]
    """The optimizer's state tensors by name (`OptimizerConfig.moments`), in the parameter's shape."""
    step: int
    """Updates that the moments have seen."""


Parts = Iterator[tuple[str, dict[str, torch.Tensor], int]]
"""Of each parameter its name, tensors by key and the optimizer's step."""


def read_weights(folder: Path, manifest: CheckpointManifest) -> Iterator[tuple[str, torch.Tensor]]:
    """Names in the layer plan and whole tensors. The folder must have been checked before (`engine.checkpoint.folder.find`)."""
    for name, weight, _ in _read(folder, manifest, ("weight",)):
        yield name, weight["weight"]


def read_states(folder: Path, manifest: CheckpointManifest) -> Iterator[ParameterState]:
    """Weights with their optimizer states, one parameter at a time."""
    moments = OptimizerConfig.model_validate(manifest.recipe["optimizer"]).moments
    for name, tensors, step in _read(folder, manifest, ("weight", *moments)):
        yield ParameterState(name, tensors.pop("weight"), tensors, step)


def _read(folder: Path, manifest: CheckpointManifest, keys: tuple[str, ...]) -> Parts:
    """Each parameter of the plan once: its name, the tensors of `keys` and the optimizer's step."""
    config, seen = ModelConfig.model_validate(manifest.recipe["model"]), set()
    layout, dimensions = manifest.layout, cut_dimensions(config)
    read_part = _read_stage_0 if layout.zero_stage == 0 else _read_shards
    for first in range(0, layout.parts, layout.tensor):
        group = (read_part(folder, manifest, part, keys) for part in range(first, first + layout.tensor))
        for (name, tensors, step), *others in zip(*group, strict=True):
            if (name := plan_name(name, config)) in seen:  # tied weights are on two stages
                continue
            seen.add(name)
            for key in keys:
                tensors[key] = join([tensors[key], *(more[key] for _, more, _ in others)], dimensions[name])
            yield name, tensors, step


def _read_stage_0(folder: Path, manifest: CheckpointManifest, part: int, keys: tuple[str, ...]) -> Parts:
    content = load_file(folder / f"mp_rank_{part:02d}_model_states.pt")
    for index, name in enumerate(manifest.parameters):
        state = content["optimizer"]["state"].get(index, {}) | {"weight": content["module"][name]}
        yield name, {key: state[key] for key in keys if key in state}, int(state.get("step", 0))


def _read_shards(folder: Path, manifest: CheckpointManifest, part: int, keys: tuple[str, ...]) -> Parts:
    files = _optimizer_files(folder, manifest, part)
    contents = [load_file(path)["optimizer_state_dict"] for path in files]
    ranks = [_vectors(content, keys[1:]) for content in contents]
    for name, place in _places(folder, manifest, part, len(ranks), contents[0].get("param_alignment_paddings")):
        yield name, {key: place.read([rank[key] for rank in ranks]) for key in keys}, ranks[0]["step"]


def _vectors(content: dict, moments: tuple[str, ...]) -> dict:
    """One rank's flat vectors, a list each: stages 1 and 2 have one a parameter group, stage 3 one a sub-group."""
    weights = content.get("fp32_flat_groups") or content["single_partition_of_fp32_groups"]
    states = (content.get("optimizer_state_dict") or content["base_optimizer_state"])["state"]
    vectors = {key: [states[i][key] for i in sorted(states)] for key in moments}
    return {"weight": weights, "step": int(states[0]["step"]) if states else 0, **vectors}


def _places(
    folder: Path, manifest: CheckpointManifest, part: int, ranks: int, paddings: list[list[int]] | None
) -> Iterator[tuple[str, "_StageOnePlace | _StageThreePlace"]]:
    """Every parameter's name, with where it lies in the vectors of all ranks."""
    stage_3 = manifest.layout.zero_stage == 3
    prefix = "zero_pp_rank_0_" if stage_3 else ""
    groups = load_file(folder / f"{prefix}mp_rank_{part:02d}_model_states.pt")["param_shapes"]
    if stage_3:
        offset = 0
        for name, shape in (item for group in groups for item in group.items()):
            share = -(-prod(shape) // ranks)
            yield name, _StageThreePlace(offset, share, shape)
            offset += share
        return
    for number, group in enumerate(groups):
        offset = 0
        for index, (name, shape) in enumerate(group.items()):
            yield name, _StageOnePlace(number, offset, shape)
            offset += prod(shape) + (paddings[number][index] if paddings else 0)


class _StageOnePlace(NamedTuple):
    group: int
    offset: int
    shape: torch.Size

    def read(self, ranks: list[list[torch.Tensor]]) -> torch.Tensor:
        return _stretch([vectors[self.group] for vectors in ranks], self.offset, prod(self.shape)).view(self.shape)


class _StageThreePlace(NamedTuple):
    offset: int
    share: int
    shape: torch.Size

    def read(self, ranks: list[list[torch.Tensor]]) -> torch.Tensor:
        parts = [_stretch(vectors, self.offset, self.share) for vectors in ranks]
        return torch.cat(parts)[: prod(self.shape)].view(self.shape)


def _stretch(pieces: list[torch.Tensor], start: int, count: int) -> torch.Tensor:
    """Elements start .. start + count - 1 of the concatenation of `pieces`, copied."""
    parts, first = [], 0
    for piece in pieces:
        low, high = max(start - first, 0), min(start + count - first, piece.numel())
        if low < high:
            parts.append(piece.flatten()[low:high])
        first += piece.numel()
    return torch.cat(parts)


def _optimizer_files(folder: Path, manifest: CheckpointManifest, part: int) -> list[Path]:
    """Those that the manifest names, in the order of their ranks; whatever else lies in the folder is not read."""
    pattern = re.compile(rf"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_{part:02d}_optim_states\.pt")
    ranks = {int(found[1]): folder / name for name in manifest.files if (found := pattern.fullmatch(name))}
    return [ranks[rank] for rank in sorted(ranks)]
