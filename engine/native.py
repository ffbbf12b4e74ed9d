"""Read DeepSpeed's own checkpoint files one parameter at a time, whatever the ZeRO stage, without DeepSpeed.

The float32 master weights of stages 1 to 3 lie cut into one flat vector a rank and parameter group:

    stage 1, 2   the parameters of a group stand one after another in one vector, which is cut evenly over the ranks
    stage 3      every parameter by itself is cut evenly (rounded up) over the ranks; each rank keeps its pieces in order

The files are memory-mapped, so a parameter costs its own size however large the checkpoint is.
"""

import re
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch

from engine.checkpoint import CheckpointManifest


def read_weights(folder: Path, manifest: CheckpointManifest) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and whole tensors, float32 wherever the checkpoint has float32. `folder` must have been checked before."""
    stage = manifest.layout.zero_stage
    if stage == 0:
        yield from _load(folder / "mp_rank_00_model_states.pt")["module"].items()
        return
    model_file = "zero_pp_rank_0_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
    shapes = _load(folder / model_file)["param_shapes"]
    ranks = [_load(path)["optimizer_state_dict"] for path in _optimizer_files(folder)]
    read = _read_stage_3 if stage == 3 else _read_stages_1_and_2
    yield from read(shapes, ranks)


def _read_stages_1_and_2(shapes: list[dict], ranks: list[dict]) -> Iterator[tuple[str, torch.Tensor]]:
    paddings = ranks[0].get("param_alignment_paddings")
    for group, group_shapes in enumerate(shapes):
        pieces = [rank["single_partition_of_fp32_groups"][group] for rank in ranks]
        offset = 0
        for index, (name, shape) in enumerate(group_shapes.items()):
            yield name, _cut(pieces, offset, prod(shape)).view(shape)
            offset += prod(shape) + (paddings[group][index] if paddings else 0)


def _read_stage_3(shapes: list[dict], ranks: list[dict]) -> Iterator[tuple[str, torch.Tensor]]:
    offset = 0
    for name, shape in (item for group in shapes for item in group.items()):
        share = -(-prod(shape) // len(ranks))
        parts = [_cut(rank["fp32_flat_groups"], offset, share) for rank in ranks]
        yield name, torch.cat(parts)[: prod(shape)].view(shape)
        offset += share


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
