"""The layer plan's parameter names, for a live engine's parameters and for those in DeepSpeed's files."""

import re
from collections.abc import Iterator

from torch import nn

from model.config import ModelConfig
from model.llama import layer_plan


def named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Like `module.named_parameters()`, in a pipeline only those of this rank's stage."""
    from engine.layout.pipeline import PipelineLayer

    stage = [layer for layer in module.modules() if isinstance(layer, PipelineLayer)]
    if not stage:
        yield from module.named_parameters()
    for layer in stage:
        for name, parameter in layer.layer.named_parameters():
            yield f"{layer.entry.name}.{name}", parameter


def plan_name(name: str, config: ModelConfig) -> str:
    """The name in the plan of a parameter that a pipeline calls `3.layer.…` or `tied_modules.embed_tokens.layer.…`."""
    if found := re.fullmatch(r"tied_modules\.([^.]+)\.layer\.(.+)", name):
        return f"{found[1]}.{found[2]}"
    if found := re.fullmatch(r"(\d+)\.layer\.(.+)", name):
        return f"{layer_plan(config)[int(found[1])].name}.{found[2]}"
    return name
