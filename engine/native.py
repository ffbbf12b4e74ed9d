"""Read DeepSpeed's own checkpoint files one parameter at a time, whatever the ZeRO stage, without DeepSpeed.

The float32 master weights and the two moments of Adam lie cut in the same way:

    stage 0      whole, on the first rank
    stage 1, 2   the parameters of a group stand one after another in one vector, which is cut evenly over the ranks
    stage 3      every parameter by itself is cut evenly (rounded up) over the ranks; each rank keeps its pieces in order

The files are memory-mapped, so a parameter costs its own size however large the checkpoint is.
"""

import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from engine.checkpoint import CheckpointManifest

MOMENTS = ("exp_avg", "exp_avg_sq")


class ParameterState(NamedTuple):
    name: str
    weight: torch.Tensor
    """The whole parameter, float32 wherever the checkpoint has float32."""
    moments: dict[str, torch.Tensor]
    """By the names of MOMENTS, in the parameter's shape."""
    step: int
    """Updates that the moments have seen."""


def read_weights(folder: Path, manifest: CheckpointManifest) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and whole tensors. The folder must have been checked before (`engine.checkpoint.find`)."""
    if manifest.layout.zero_stage == 0:
        yield from _load(folder / "mp_rank_00_model_states.pt")["module"].items()
        return
    vectors = [_vectors(_load(path)["optimizer_state_dict"])["weight"] for path in _optimizer_files(folder)]
    for name, cut in _cuts(folder, manifest, len(vectors)):
        yield name, cut(vectors)


def read_states(folder: Path, manifest: CheckpointManifest) -> Iterator[ParameterState]:
    """Weights with their optimizer states, one parameter at a time."""
    if manifest.layout.zero_stage == 0:
        yield from _read_stage_0(folder, manifest)
        return
    ranks = [_vectors(_load(path)["optimizer_state_dict"]) for path in _optimizer_files(folder)]
    for name, cut in _cuts(folder, manifest, len(ranks)):
        weight, *moments = (cut([rank[key] for rank in ranks]) for key in ("weight", *MOMENTS))
        yield ParameterState(name, weight, dict(zip(MOMENTS, moments, strict=True)), ranks[0]["step"])


def _read_stage_0(folder: Path, manifest: CheckpointManifest) -> Iterator[ParameterState]:
    content = _load(folder / "mp_rank_00_model_states.pt")
    for index, name in enumerate(manifest.parameters):
        state = content["optimizer"]["state"][index]
        yield ParameterState(name, content["module"][name], {key: state[key] for key in MOMENTS}, int(state["step"]))


def _vectors(content: dict) -> dict:
    """One rank's flat vectors, a list each: stages 1 and 2 have one a parameter group, stage 3 one a sub-group."""
    weights = content.get("fp32_flat_groups") or content["single_partition_of_fp32_groups"]
    states = (content.get("optimizer_state_dict") or content["base_optimizer_state"])["state"]
    moments = {key: [states[i][key] for i in sorted(states)] for key in MOMENTS if states}
    return {"weight": weights, "step": int(states[0]["step"]) if states else 0, **moments}


def _cuts(folder: Path, manifest: CheckpointManifest, ranks: int) -> Iterator[tuple[str, object]]:
    """Every parameter's name, with a function that cuts it out of the vectors of all ranks."""
    stage_3 = manifest.layout.zero_stage == 3
    model_file = "zero_pp_rank_0_mp_rank_00_model_states.pt" if stage_3 else "mp_rank_00_model_states.pt"
    groups = _load(folder / model_file)["param_shapes"]
    if stage_3:
        offset = 0
        for name, shape in (item for group in groups for item in group.items()):
            share = -(-prod(shape) // ranks)
            yield name, _StageThreeCut(offset, share, shape)
            offset += share
        return
    paddings = _load(_optimizer_files(folder)[0])["optimizer_state_dict"].get("param_alignment_paddings")
    for number, group in enumerate(groups):
        offset = 0
        for index, (name, shape) in enumerate(group.items()):
            yield name, _StageOneCut(number, offset, shape)
            offset += prod(shape) + (paddings[number][index] if paddings else 0)


class _StageOneCut(NamedTuple):
    group: int
    offset: int
    shape: torch.Size

    def __call__(self, ranks: list[list[torch.Tensor]]) -> torch.Tensor:
        return _cut([vectors[self.group] for vectors in ranks], self.offset, prod(self.shape)).view(self.shape)


class _StageThreeCut(NamedTuple):
    offset: int
    share: int
    shape: torch.Size

    def __call__(self, ranks: list[list[torch.Tensor]]) -> torch.Tensor:
        parts = [_cut(vectors, self.offset, self.share) for vectors in ranks]
        return torch.cat(parts)[: prod(self.shape)].view(self.shape)


def _cut(pieces: list[torch.Tensor], start: int, count: int) -> torch.Tensor:
    """Elements start .. start + count - 1 of the concatenation of `pieces`, copied."""
    parts, first = [], 0
    for piece in pieces:
        low, high = max(start - first, 0), min(start + count - first, piece.numel())
        if low < high:
            parts.append(piece.flatten()[low:high])
        first += piece.numel()
    return torch.cat(parts)


def _optimizer_files(folder: Path) -> list[Path]:
    files = folder.glob("*zero_pp_rank_*_optim_states.pt")
    return sorted(files, key=lambda path: int(re.search(r"pp_rank_(\d+)_", path.name)[1]))


def _load(path: Path) -> dict:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
