"""What must survive a restart, besides weights and optimizer state: one small typed object."""

from pydantic import BaseModel, ConfigDict


class TrainState(BaseModel):
    """Advanced after each optimizer step and stored in every checkpoint.

    Together with the recipe it says which sample comes next, on any number of ranks: sample k of the run is a pure
    function of (data_fingerprint, seed, weights, k).
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    version: int = 1
    data_fingerprint: str
    seed: int
    step: int = 0
    """Optimizer steps done, the skipped ones included."""
    consumed_samples: int = 0
    """Samples of the global order that were used, by all ranks together."""
    consumed_tokens: int = 0
    skipped_steps: int = 0
    consecutive_skipped_steps: int = 0
    wandb_id: str

    def advance(self, samples: int, tokens: int, applied: bool) -> None:
        """Account for one optimizer step over `samples` rows and `tokens` tokens."""
        self.step += 1
        self.consumed_samples += samples
        self.consumed_tokens += tokens
        self.skipped_steps += not applied
        self.consecutive_skipped_steps = 0 if applied else self.consecutive_skipped_steps + 1
