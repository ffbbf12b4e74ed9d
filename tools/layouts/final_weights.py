"""The final weights of runs, compared parameter by parameter."""

from pathlib import Path

import numpy as np
import torch

from engine.checkpoint.deepspeed_files import read_weights
from engine.checkpoint.folder import find
from tools.layouts.layout import LaunchFailed


class Weights:
    """The final weights of one run, kept as a file a parameter to compare others with, one parameter in memory at a time."""

    def __init__(self, run: Path, folder: Path) -> None:
        folder.mkdir()
        self.files = {}
        for number, (name, weight) in enumerate(read_weights(*find(run))):
            self.files[name] = folder / f"{number}.npy"
            np.save(self.files[name], weight.detach().float().numpy())

    def difference(self, run: Path) -> float:
        """See `Difference.weights`. Raises LaunchFailed when the run has another model."""
        largest, seen = 0.0, set()
        for name, weight in read_weights(*find(run)):
            kept = torch.from_numpy(np.load(self.files[name])) if name in self.files else None
            if kept is None or kept.shape != weight.shape:
                raise LaunchFailed(f"has another model: {name} {list(weight.shape)} has no counterpart to compare with")
            norm, scale = (
                torch.linalg.vector_norm(tensor, dtype=torch.float64).item()
                for tensor in (weight.detach() - kept, kept)
            )
            seen.add(name)
            largest = float(np.maximum(largest, norm / (scale or 1.0)))  # keeps a NaN
        if missing := self.files.keys() - seen:
            raise LaunchFailed(f"has another model: it lacks {', '.join(sorted(missing))}")
        return largest
