"""`training.initial_weights`: where a run's first weights come from when they are not random.

A Hugging Face folder, a run's folder (its newest good checkpoint) or one checkpoint of it, written in any layout. The
recipe may ask for other positions than the source has, so that training goes on with longer rows.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash

from engine.checkpoint.deepspeed_files import read_weights
from engine.checkpoint.folder import find, newest_good
from engine.checkpoint.manifest import CheckpointManifest, FindChange, find_change, read_manifest
from engine.checkpoint.verification import on_first_rank
from model.adapter_config import AdaptersConfig
from model.config import ROPE_EXTENDS_ORIGINAL, ModelConfig
from model.hf.peft import PeftAdapter
from model.hf.weights import load_hf
from storage.manifest import TokenizerInfo
from training.config import Recipe

MAY_DIFFER = {
    # what shapes no weight and is changed on purpose, to train on with other rows or another visibility
    "max_position_embeddings",
    "rope_theta",
    "rope_scaling",
    "initializer_range",
    "sliding_window",
    "attention",
    "chunk_size",
    "is_causal",
    "adapters",
}


class WeightSource(NamedTuple):
    model: ModelConfig
    trained_length: int
    """Longest row or document, in tokens, that the weights know."""
    checkpoint: tuple[Path, CheckpointManifest] | None
    """None: a Hugging Face folder."""


def open_source(path: str, full: bool, find_change: FindChange = find_change) -> WeightSource:
    """Read what the weights belong to. `full`: prove every byte of a checkpoint by its hash, not only by its size, with
    `find_change`.

    Raises ValueError when there is nothing to start from, or it is damaged.
    """
    folder = Path(path)
    if (folder / "config.json").is_file():
        model = ModelConfig.from_hf(folder)
        if model.adapters.names:
            raise ValueError(f"{folder} is a mixture of adapters: start from an export in which one is merged")
        return WeightSource(model, model.max_position_embeddings, None)
    if (folder / "checkpoints").is_dir():
        found = find(folder, find_change=find_change) if full else newest_good(folder, full=False)
    elif folder.is_dir() and folder.name.startswith("step-"):
        found = folder, read_manifest(folder, full, find_change)
    else:
        raise ValueError(
            f"{folder} is neither a Hugging Face folder (no config.json) nor a run (no checkpoints) nor a checkpoint "
            "(checkpoints/step-...) of one"
        )
    if found is None:
        raise ValueError(f"{folder} has no checkpoint yet")
    checkpoint, manifest = found[:2]
    model = ModelConfig.model_validate(manifest.recipe["model"])
    if model.adapters.names:
        raise ValueError(f"{folder} was trained with adapters: start from an export of it in which one is merged")
    lengths = [stage["seq_length"] for stage in manifest.data.get("stages", [manifest.data])]
    return WeightSource(model, max(lengths), (checkpoint, manifest))


class Fingerprinted:
    """Weights on their way into a model, and afterwards what they were."""

    def __init__(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        self._weights = weights
        self._digests: dict[str, str] = {}

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self._weights:
            content = xxhash.xxh3_128(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            content.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
            self._digests[name] = content.hexdigest()
            yield name, tensor

    @property
    def digest(self) -> str:
        """Of names and values, in whatever order and files they lay."""
        return xxhash.xxh3_128(json.dumps(self._digests, sort_keys=True).encode()).hexdigest()


def initial_weights_problems(recipe: Recipe, tokenizer: TokenizerInfo, data: str) -> list[str]:
    """Why the recipe's model cannot start from its `training.initial_weights`, one sentence each.

    `tokenizer` is that of the training data, `data` their name.
    """
    path, ours = recipe.training.initial_weights, recipe.model
    assert path is not None
    try:
        source = open_source(path, full=False)
    except ValueError as error:
        return [f"training.initial_weights: {error}"]
    theirs = source.model
    problems = [
        f"{path} has {key} {_filled(theirs, key)!r} but the recipe's model.{key} is {_filled(ours, key)!r}"
        for key in ModelConfig.model_fields
        if key not in MAY_DIFFER
        and getattr(ours, key) != getattr(theirs, key)
        and _filled(ours, key) != _filled(theirs, key)
    ]
    if source.checkpoint and source.checkpoint[1].data["tokenizer"]["sha256"] != tokenizer.sha256:
        problems.append(
            f"{path} was trained with another tokenizer than {data}: build the data with the run's tokenizer"
        )
    scaling, length = ours.rope_scaling or {}, source.trained_length
    silent = scaling.get("rope_type") in ROPE_EXTENDS_ORIGINAL and "original_max_position_embeddings" not in scaling
    if silent and scaling != theirs.rope_scaling and ours.max_position_embeddings != length:
        problems.append(
            f"model.rope_scaling lacks original_max_position_embeddings, which would be model.max_position_embeddings, "
            f"{ours.max_position_embeddings}, but {path} was trained for {length} positions: give it"
        )
    return [f"training.initial_weights: {problem}" for problem in problems] + _adapter_problems(recipe)


def _adapter_problems(recipe: Recipe) -> list[str]:
    """Why the recipe's adapters cannot start from their `adapters.initial_weights`."""
    adapters, problems = recipe.adapters, []
    base = recipe.model.model_copy(update={"adapters": AdaptersConfig()})
    for name, folder in adapters.initial_weights.items():
        try:
            found = PeftAdapter(Path(folder), base)
        except ValueError as error:
            problems.append(f"adapters.initial_weights.{name}: {error}")
            continue
        layers = adapters.adapted_layers(base.num_hidden_layers)
        pairs = {
            "r": (found.r, adapters.rank(name)),
            "lora_alpha": (found.lora_alpha, adapters.alpha(name)),
            "use_rslora": (found.use_rslora, adapters.use_rslora),
            "target_modules": (list(found.target_modules), list(adapters.target_modules)),
            "last_layers": (len(found.layers), len(layers)),
        }
        problems += [
            f"adapters.initial_weights.{name}: {folder} has {key} {theirs} but the recipe's is {ours}"
            for key, (theirs, ours) in pairs.items()
            if theirs != ours
        ]
    return problems


def adapters_at_start(recipe: Recipe, base: Fingerprinted) -> Iterator[tuple[str, torch.Tensor]]:
    """Names in the layer plan and tensors of the adapters that do not start from nothing, to be read after their base.

    Raises ValueError where one was trained on other weights.
    """
    plain = recipe.model.model_copy(update={"adapters": AdaptersConfig()})
    for name, folder in recipe.adapters.initial_weights.items():
        adapter = PeftAdapter(Path(folder), plain)
        if adapter.base_digest not in (None, base.digest):
            raise ValueError(f"{folder} was trained on other weights than those of {recipe.training.initial_weights}")
        yield from adapter.state(name).items()


def _filled(model: ModelConfig, key: str) -> Any:
    """The value of a field, with the defaults that depend on others filled in."""
    return {"num_key_value_heads": model.kv_heads, "head_dim": model.head_width}.get(key, getattr(model, key))


def read_initial_weights(recipe: Recipe) -> Iterator[tuple[str, torch.Tensor]] | None:
    """Names in the layer plan and whole tensors; of a run, from the checkpoint that all ranks have proved good.

    None where the recipe names no source. Collective over all ranks. Raises ValueError, on all ranks, when the source is
    damaged.
    """
    if (path := recipe.training.initial_weights) is None:
        return None
    return weights_of(on_first_rank(lambda find_change: open_source(path, True, find_change)), path)


def weights_of(source: WeightSource, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Names in the layer plan and whole tensors of what was opened at `path`."""
    return load_hf(path)[1] if source.checkpoint is None else read_weights(*source.checkpoint)
