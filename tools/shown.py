"""What is shown of a run, in the report and in the W&B workspace alike."""

LAYER_FIGURES = {
    "grad_norm": ("Gradient norm", True),
    "parameter_rms": ("Parameters (RMS)", True),
    "update_rms": ("Update (RMS)", True),
    "activation_rms": ("Activations (RMS)", True),
    "max_attention_logit": ("Largest attention logit", False),
}
"""Of each layer, by kind: title, and whether its colours are those of the logarithm (see `engine.layer_statistics.Figures`)."""
