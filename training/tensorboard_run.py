"""TensorBoard: event files under `RUN/tensorboard`, with the names of the W&B dashboard, for its own reader and others."""

import sys
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from training.wandb_run import wandb_values

FOLDER = "tensorboard"


class TensorBoardRun:
    """Every launch writes a file of its own; steps that are done again take the place of those that were done before.

    A disk that takes nothing more ends the recording, not the run.
    """

    def __init__(self, run_dir: Path, resumed_step: int = 0) -> None:
        self._folder = run_dir / FOLDER
        self._writer: SummaryWriter | None = None
        self._open(resumed_step)

    def write(self, record: dict[str, Any]) -> None:
        if self._writer is None:
            return
        try:
            for key, value in wandb_values(record).items():
                self._writer.add_scalar(key, value, record["step"], record["time"])
            self._writer.flush()
        except (OSError, RuntimeError) as error:
            self._give_up(error)

    def go_back(self, step: int) -> None:
        """The reader leaves out what came after this step before."""
        self.close(0)
        self._open(step)

    def close(self, exit_code: int) -> None:
        if self._writer is not None:
            try:
                self._writer.close()
            except (OSError, RuntimeError) as error:
                self._give_up(error)
            self._writer = None

    def _open(self, last_step: int) -> None:
        try:
            self._writer = SummaryWriter(str(self._folder), purge_step=last_step + 1 if last_step else None)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._writer = None
        print(f"warning: TensorBoard records nothing from here on in {self._folder} ({error})", file=sys.stderr)
