"""Open `torch.save`'s files without running what they may contain (`weights_only`)."""

import os
from pathlib import Path
from typing import Any

import torch

from launch.topology import choose_accelerator


def load_file(path: Path) -> Any:
    """The content of a checkpoint's file, its tensors memory-mapped on the CPU.

    Raises ValueError when it holds anything but tensors, containers and the few classes of DeepSpeed that its own files
    have: an unpickled object could run any code.
    """
    return _load(path, map_location="cpu", mmap=True)


def load_index(path: Path) -> Any:
    """As `load_file`, but of the tensors only what they are and where (`position_of`), on the "meta" device."""
    return _load(path, map_location="meta")


def _load(path: Path, **how: Any) -> Any:
    allow_deepspeed_classes()
    try:
        return torch.load(path, weights_only=True, **how)
    except Exception as error:
        raise refusal(path, error) from None


def position_of(tensor: torch.Tensor) -> int:
    """The byte of its file at which a tensor of `load_index` begins."""
    assert tensor.is_contiguous()
    start = tensor.untyped_storage()._checkpoint_offset
    assert start is not None
    return int(start + tensor.storage_offset() * tensor.element_size())


def refusal(path: Path, error: Exception) -> ValueError:
    """What is said of a file that cannot be opened safely."""
    reason = next((line for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), str(error))
    return ValueError(
        f"{path} is not opened: it is damaged or holds more than weights ({' '.join(reason.split())[:200]})"
    )


def force_everywhere() -> None:
    """Make every `torch.load` of this process, DeepSpeed's own included, refuse what `load_file` refuses."""
    allow_deepspeed_classes()
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"


def allow_deepspeed_classes() -> None:
    """The classes in the files that DeepSpeed 0.19 writes; all of them hold numbers only."""
    choose_accelerator()
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])
