"""Weights in Hugging Face's form: names, lazy reading and streaming writing of safetensors folders."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import ModelConfig
from ..llama import Llama

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEAD = "lm_head.weight"
EMBEDDING = "embed_tokens.weight"
TRANSFORMERS_VERSION = "5.0.0"
"""Whose reading of `config.json` is meant; without it transformers guesses at how old the folder is."""


def to_hf_name(name: str) -> str:
    """`layers.0...` -> `model.layers.0...`; the head keeps its name."""
    return name if name == HEAD else f"model.{name}"


def from_hf_name(name: str) -> str:
    """The inverse of `to_hf_name`."""
    return name.removeprefix("model.")


def to_hf_state(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The state of a `Llama` under the names of transformers' `...ForCausalLM`, a tied head left out."""
    tied = {HEAD} if config.tie_word_embeddings else set()
    return {to_hf_name(name): tensor for name, tensor in state.items() if name not in tied}


def from_hf_state(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse: a state that `Llama(config).load_state_dict` takes, a tied head filled in."""
    own = {from_hf_name(name): tensor for name, tensor in state.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        own[HEAD] = own[EMBEDDING]
    return own


def from_hf_model(model: PreTrainedModel) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and `Llama` state of a loaded transformers model, whatever file format it came from.

    `save_hf(config, state.items(), folder)` then writes it as a folder. Raises ValueError for weights that are still
    quantized (those of a GGUF file are not, once loaded).
    """
    state = model.state_dict()
    if quantized := [name for name, tensor in state.items() if not tensor.is_floating_point()]:
        raise ValueError(f"{quantized[0]} is quantized; load the model with dequantized weights")
    config = ModelConfig.from_hf({k: v for k, v in model.config.to_dict().items() if k != "quantization_config"})
    return config, from_hf_state(state, config)


def load_hf(folder: str | Path) -> tuple[ModelConfig, Iterator[tuple[str, Tensor]]]:
    """Config of a Hugging Face folder, and its weights one at a time under the names of `Llama`.

    One file or sharded with an index; only the tensor at hand is in memory. A tied head is not yielded. Raises
    ValueError when weights are missing, unknown, or of another shape than the config says, before the first is read.
    """
    folder = Path(folder)
    config = ModelConfig.from_hf(folder)
    files = _weight_files(folder)
    expected = {name: tuple(p.shape) for name, p in meta_model(config).named_parameters()}
    places: dict[str, tuple[Path, str]] = {}
    for file in files:
        for name, shape in shapes_of(file).items():
            own = from_hf_name(name)
            if own.endswith("rotary_emb.inv_freq") or (own == HEAD and config.tie_word_embeddings):
                continue
            if own not in expected:
                raise ValueError(f"{file}: {name} is not a weight of the model that config.json describes")
            if shape != expected[own]:
                raise ValueError(f"{file}: {name} has shape {shape}, config.json says {expected[own]}")
            places[own] = file, name
    if missing := sorted(expected.keys() - places.keys()):
        raise ValueError(f"{folder}: {len(missing)} weights are missing, first {to_hf_name(missing[0])}")
    return config, _read(places)


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Llama:
    """A `Llama` with the weights of a Hugging Face folder; memory for one model and one tensor."""
    config, tensors = load_hf(folder)
    model = meta_model(config).to(dtype).to_empty(device=device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors:
            parameters[name].copy_(tensor)
    return model


def save_hf(
    config: ModelConfig,
    tensors: Iterable[tuple[str, Tensor]],
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = 5 * 10**9,
    token_ids: dict[str, int | None] | None = None,
    objective: dict[str, Any] | None = None,
) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads, of a mixture of adapters with `trust_remote_code`; of
    a model that is not causal `AutoModelForMaskedLM` does, with that too. The code is put beside the weights.

    `tensors`: (name in `Llama`, tensor on any device) in any order, each once, such as `state_dict().items()`; a tied
    head is left out. One shard of at most `max_shard_bytes` (or one tensor) is in memory at a time. `objective`: what the
    model was trained for, kept in `config.json` for whoever evaluates or uses it. Files appear
    complete or not at all, `config.json` last: a folder without it holds no model. Raises ValueError when the folder
    already holds a model, or when `tensors` is not exactly the model's weights.
    """
    hf_config = config.to_hf(_without_stand_in(token_ids or {}))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if present := [*folder.glob("model*.safetensors*"), *folder.glob("config.json")]:
        raise ValueError(f"{present[0]}: exists already; give an empty output folder")
    missing = {name for name, _ in meta_model(config).named_parameters()}
    shards: list[tuple[Path, list[str]]] = []
    shard: dict[str, Tensor] = {}
    total_bytes = shard_bytes = 0
    try:
        for name, tensor in tensors:
            if name == HEAD and config.tie_word_embeddings:
                continue
            if name not in missing:
                raise ValueError(f"{name} is not a weight of this model, or came twice")
            missing.remove(name)
            tensor = tensor.detach().to("cpu", dtype).contiguous()
            if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
                shards.append(_write_shard(folder, len(shards), shard))
                shard, shard_bytes = {}, 0
            shard[to_hf_name(name)] = tensor
            shard_bytes += tensor.nbytes
            total_bytes += tensor.nbytes
        if missing:
            raise ValueError(f"{len(missing)} weights of the model are missing, first {min(missing)}")
        shards.append(_write_shard(folder, len(shards), shard))
    except BaseException:
        for path in folder.glob(".model-*.part"):
            path.unlink()
        raise
    _publish_shards(folder, shards, total_bytes)
    ids = {key: value for key, value in (token_ids or {}).items() if value is not None}
    write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
    name = str(dtype).removeprefix("torch.")
    written: dict[str, Any] = {"dtype": name, "torch_dtype": name, "transformers_version": TRANSFORMERS_VERSION}
    if objective is not None:
        written["objective"] = objective
    if "auto_map" in hf_config:
        for module in {place.partition(".")[0] for place in hf_config["auto_map"].values()}:
            code = Path(__file__).with_name(f"{module}.py")
            (folder / code.name).write_bytes(code.read_bytes())
    write_json(folder / "config.json", {**hf_config, **written})
    _sync_folder(folder)


def _without_stand_in(token_ids: dict[str, int | None]) -> dict[str, int | None]:
    """No padding where EOS stands in for it: transformers would take no gradient for its embedding."""
    same = token_ids.get("pad_token_id") == token_ids.get("eos_token_id")
    return {key: value for key, value in token_ids.items() if not (same and key == "pad_token_id")}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Atomically: a temporary file in the same folder, flushed to disk, renamed."""
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=2, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def meta_model(config: ModelConfig) -> Llama:
    """Names and shapes without memory."""
    with torch.device("meta"):
        return Llama(config)


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        if not (folder / "model.safetensors").exists():
            raise ValueError(f"{folder}: neither model.safetensors nor {index.name} is there")
        return [folder / "model.safetensors"]
    files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    for file in files:
        if not file.exists():
            raise ValueError(f"{file}: named in {index.name} but missing")
    return files


def shapes_of(file: Path) -> dict[str, tuple[int, ...]]:
    """Of the tensors in a safetensors file. Raises ValueError where it is damaged."""
    try:
        with safe_open(file, framework="pt") as weights:
            return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged or incomplete ({error})") from None


def _read(places: dict[str, tuple[Path, str]]) -> Iterator[tuple[str, Tensor]]:
    by_file: dict[Path, list[tuple[str, str]]] = {}
    for own, (file, name) in places.items():
        by_file.setdefault(file, []).append((own, name))
    for file, names in by_file.items():
        with safe_open(file, framework="pt") as weights:
            for own, name in names:
                yield own, weights.get_tensor(name)


def _write_shard(folder: Path, number: int, shard: dict[str, Tensor]) -> tuple[Path, list[str]]:
    path = folder / f".model-{number + 1:05d}.part"
    write_tensors(path, shard)
    return path, list(shard)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, flushed to disk. Raises OSError where the file system refuses."""
    try:
        save_file(tensors, path, metadata={"format": "pt"} | (metadata or {}))
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written ({error})") from None
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _publish_shards(folder: Path, shards: list[tuple[Path, list[str]]], total_bytes: int) -> None:
    if len(shards) == 1:
        shards[0][0].replace(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, (path, names) in enumerate(shards, start=1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        path.replace(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
