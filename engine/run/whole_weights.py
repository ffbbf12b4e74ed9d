"""All weights of a checkpoint, those included that it leaves to the base of its adapters."""

from collections.abc import Iterator
from pathlib import Path

import torch

from engine.checkpoint.deepspeed_files import read_weights
from engine.checkpoint.manifest import CheckpointManifest
from engine.run.initial_weights import Fingerprinted, open_source, weights_of
from model.adapter_config import AdaptersConfig, adapter_of
from model.config import ModelConfig
from model.llama import layer_plan
from model.positions import resize_positions


def read_base(folder: Path, manifest: CheckpointManifest) -> Iterator[tuple[str, torch.Tensor]]:
    """Names in the layer plan and whole tensors, one at a time, of everything but adapters.

    Raises ValueError where the base of adapters is not where the recipe says, or after its last tensor if it has changed.
    """
    config = ModelConfig.model_validate(manifest.recipe["model"])
    if not config.adapters.freeze_base:
        yield from ((name, tensor) for name, tensor in read_weights(folder, manifest) if adapter_of(name) is None)
        return
    path = manifest.recipe["training"].get("initial_weights")
    if path is None:
        for entry in layer_plan(config.model_copy(update={"adapters": AdaptersConfig()})):
            for name, parameter in entry.build(manifest.state.seed).named_parameters():
                yield f"{entry.name}.{name}", parameter.detach()
        return
    source = Fingerprinted(weights_of(open_source(path, full=True), path))
    for name, tensor in source:
        positions = name == "embed_positions.weight"
        yield name, resize_positions(tensor, config.max_position_embeddings) if positions else tensor
    if source.digest != manifest.base:
        raise ValueError(f"{folder}: its adapters were trained on other weights than those of {path}: restore these")


def read_adapters(folder: Path, manifest: CheckpointManifest) -> dict[str, torch.Tensor]:
    """The parameters of all adapters by their names in the layer plan."""
    return {name: tensor for name, tensor in read_weights(folder, manifest) if adapter_of(name) is not None}
