"""What must survive a restart, besides weights and optimizer state, in small typed objects."""

from pydantic import BaseModel, ConfigDict

from training.decisions import Decision


class TrainState(BaseModel):
    """Advanced after each optimizer step and stored in every checkpoint.

    Together with the recipe it says which sample comes next, on any number of ranks: sample k of a stage is a pure
    function of the data, seed and weights of this stage and of the earlier ones over the same data, and of k.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    version: int = 1
    data_fingerprint: str
    """Of the data that the last step used."""
    seed: int
    step: int = 0
    """Optimizer steps done, the skipped ones included."""
    consumed_samples: int = 0
    """Samples of the global order that were used, by all ranks together."""
    stage_samples: list[int] = []
    """Samples that each earlier stage used; what `consumed_samples` has beyond their sum is the current stage's."""
    consumed_tokens: int = 0
    batches: list[tuple[int, int, int]] = []
    """The totals' history: so many steps of so many samples and tokens each, then so many of others; since it is kept."""
    skipped_steps: int = 0
    consecutive_skipped_steps: int = 0
    window: list[tuple[float, float]] = []
    """Losses and gradient norms of the last steps of this stage that were applied, where the recipe watches for spikes."""
    decisions: list[Decision] = []
    """All that are known of this run, of later steps too where it is repeated."""
    wandb_id: str

    @property
    def consumed_in_stage(self) -> int:
        """Samples of the current stage that were used."""
        return self.consumed_samples - sum(self.stage_samples)

    def enter(self, stage: int, fingerprint: str) -> None:
        """Go on with the stage of this index, on the data with this fingerprint; nothing changes within a stage."""
        assert len(self.stage_samples) <= stage, "a stage that has ended cannot be entered again"
        while len(self.stage_samples) < stage:
            self.stage_samples.append(self.consumed_in_stage)
            self.window = []
        self.data_fingerprint = fingerprint

    def advance(self, samples: int, tokens: int, applied: bool) -> None:
        """Account for one optimizer step over `samples` rows and `tokens` tokens."""
        self.step += 1
        self.consumed_samples += samples
        self.consumed_tokens += tokens
        if self.batches and self.batches[-1][1:] == (samples, tokens):
            self.batches[-1] = (self.batches[-1][0] + 1, samples, tokens)
        else:
            self.batches.append((1, samples, tokens))
        self.skipped_steps += not applied
        self.consecutive_skipped_steps = 0 if applied else self.consecutive_skipped_steps + 1

    def remember(self, loss: float, grad_norm: float, steps: int) -> None:
        """Those of a step that was applied, for as many steps as given."""
        self.window = [*self.window, (loss, grad_norm)][-steps:]


class PriorState(BaseModel):
    """Of a learned prior, a row for each source and a number for each adapter, as a checkpoint's manifest keeps it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    logits: list[list[float]]
    exp_avg: list[list[float]]
    exp_avg_sq: list[list[float]]
    step: int
