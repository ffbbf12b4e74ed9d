"""What is shown of a run, in the report and in the W&B workspace alike."""

from typing import NamedTuple


class Series(NamedTuple):
    """A figure of every logged step."""

    key: str
    """Of the record."""
    title: str
    section: str
    """Of the workspace."""
    ticks: str = "~g"
    """How the report's axis writes numbers, after the factor."""
    is_log: bool = False
    is_noisy: bool = False
    unit: str = ""
    """Of the report's axis; W&B gets the record's own."""
    factor: float = 1.0
    """From the record's unit to that one."""


SERIES = (
    Series("learning_rate", "Learning rate", "Optimisation", ".2~e"),
    Series("grad_norm", "Gradient norm before clipping", "Optimisation", is_log=True, is_noisy=True),
    Series("tokens_per_second", "Tokens per second", "Speed", "~s", is_noisy=True),
    Series("mfu", "Share of peak FLOP/s (MFU)", "Speed", "~%", is_noisy=True),
    Series("data_wait_fraction", "Time waiting for data", "Speed", "~%", is_noisy=True),
    Series("memory_bytes", "Peak memory of the first rank", "Speed", unit="GiB", factor=2.0**-30),
)
LAYER_FIGURES = {
    "grad_norm": ("Gradient norm", True),
    "parameter_rms": ("Parameters (RMS)", True),
    "update_rms": ("Update (RMS)", True),
    "activation_rms": ("Activations (RMS)", True),
    "max_attention_logit": ("Largest attention logit", False),
}
"""Of each layer, by kind: title, and whether its colours are those of the logarithm (see `engine.layer_statistics.Figures`)."""
OF_GROUPS = "Gradient norm by parameter group"
OF_SOURCES = "Validation loss by source"
PLANNED = {"step_seconds": "seconds a step", "rank_memory": "bytes of a rank's memory at most"}
"""What a plan foresees and a run measures: the ends of `planned_...` and `measured_...` in its records."""
