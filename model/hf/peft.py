"""Adapters in PEFT's form: a folder with `adapter_config.json` and `adapter_model.safetensors` for each, in both directions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..adapter_config import FACTORS, PROJECTIONS, AdaptersConfig, adapter_of
from ..config import ModelConfig
from .weights import meta_model, shapes_of, write_json, write_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model.model."
BASE_DIGEST = "longform_base"
"""In the weights file: the digest of the base that the adapter was trained on."""
PLAIN: dict[str, Any] = {
    "bias": "none",
    "fan_in_fan_out": False,
    "layer_replication": None,
    "lora_bias": False,
    "modules_to_save": None,
    "use_dora": False,
    "use_qalora": False,
    "alora_invocation_tokens": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "exclude_modules": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}
"""Of LoraConfig: what has to be so (or left out) for the adapter to be plain LoRA."""


def peft_name(parameter: str, adapter: str) -> str:
    """In PEFT's file, of a parameter of this adapter in a `Llama`."""
    factor = next(begin for begin in FACTORS if begin + adapter in parameter)
    return PREFIX + parameter.replace(factor + adapter, factor.removesuffix("_")) + ".weight"


def save_peft(
    config: ModelConfig,
    adapter: str,
    state: dict[str, Tensor],
    folder: Path,
    base: str | None,
    base_digest: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write one adapter as a folder that `peft.PeftModel.from_pretrained` loads.

    `state`: parameters of a `Llama` by name, of which those of the adapter are taken; `base`: where PEFT finds the model.
    """
    adapters = config.adapters
    named = {
        peft_name(name, adapter): tensor.to(dtype).contiguous()
        for name, tensor in state.items()
        if name.rpartition(".")[2] in {begin + adapter for begin in FACTORS}
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, named, {BASE_DIGEST: base_digest} if base_digest else {})
    layers = adapters.adapted_layers(config.num_hidden_layers)
    content = PLAIN | {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": adapters.rank(adapter),
        "lora_alpha": adapters.alpha(adapter),
        "lora_dropout": config.adapters.lora_dropout,
        "use_rslora": adapters.use_rslora,
        "target_modules": list(adapters.target_modules),
        "layers_to_transform": None if len(layers) == config.num_hidden_layers else list(layers),
        "init_lora_weights": True,
    }
    write_json(folder / CONFIG, content)


class PeftAdapter:
    """One adapter in PEFT's form, whose config has been read and judged; weights are read by `state`."""

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        """`config`: of the base. Raises ValueError where it is no plain LoRA, or one of another base, of torch's pickles, say."""
        self.folder = folder
        given = _read_config(folder)
        self.r, self.lora_alpha = given.get("r", 8), given.get("lora_alpha", 8)
        self.use_rslora = bool(given.get("use_rslora"))
        self.shapes, self.base_digest = _read_shapes(folder)
        self.target_modules = tuple(name for name in PROJECTIONS if any(f".{name}." in key for key in self.shapes))
        self.layers = sorted({int(found[1]) for key in self.shapes if (found := re.search(r"\.layers\.(\d+)\.", key))})
        expected = {peft_name(name, "x"): shape for name, shape in self._expected(config).items()}
        for key, shape in self.shapes.items():
            if key not in expected:
                raise ValueError(f"{folder / WEIGHTS}: {key} is not of an adapter of a LLaMA's linear maps")
            if shape != expected[key]:
                raise ValueError(
                    f"{folder / WEIGHTS}: {key} has shape {shape}, for this base it would be {expected[key]}: it is an "
                    "adapter of another model"
                )
        if missing := sorted(expected.keys() - self.shapes.keys()):
            raise ValueError(f"{folder / WEIGHTS}: {len(missing)} weights are missing, first {missing[0]}")

    def state(self, adapter: str) -> dict[str, Tensor]:
        """Parameters of a `Llama` by name, of the adapter under its name there."""
        with safe_open(self.folder / WEIGHTS, framework="pt") as weights:
            return {own_name(key, adapter): weights.get_tensor(key) for key in self.shapes}

    def _expected(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        last = config.num_hidden_layers - (self.layers[0] if self.layers else 0)
        if not self.layers or self.layers != list(range(self.layers[0], config.num_hidden_layers)):
            raise ValueError(
                f"{self.folder / WEIGHTS}: its layers {self.layers} are not the last ones of the base's "
                f"{config.num_hidden_layers}: such adapters cannot be continued here"
            )
        wanted = {"names": ("x",), "r": self.r, "target_modules": self.target_modules, "last_layers": last}
        own = config.model_copy(update={"adapters": AdaptersConfig(**wanted)})
        named = meta_model(own).named_parameters()
        return {name: tuple(p.shape) for name, p in named if adapter_of(name) is not None}


def own_name(key: str, adapter: str) -> str:
    """In a `Llama`, of a weight in PEFT's file."""
    path = key.removeprefix(PREFIX).removesuffix(".weight")
    return f"{path}_{adapter}"


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder}: there is no {CONFIG}, so it is no folder of PEFT's")
    try:
        given = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{folder / CONFIG}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(given, dict):
        raise ValueError(f"{folder / CONFIG}: not a JSON object")
    if given.get("peft_type") != "LORA":
        raise ValueError(
            f"{folder / CONFIG}: peft_type {given.get('peft_type')!r} is no LoRA: only LORA adapters are read"
        )
    library = (given.get("auto_mapping") or {}).get("parent_library", "transformers")
    if str(library).partition(".")[0] != "transformers":
        raise ValueError(f"{folder / CONFIG}: auto_mapping asks for code of {library}, which is not run")
    for key, plain in PLAIN.items():
        if (value := given.get(key, plain)) != plain and value:
            raise ValueError(f"{folder / CONFIG}: {key} {value!r} is more than plain LoRA: such adapters are not read")
    for key in ("r", "lora_alpha"):
        if (
            not isinstance(given.get(key, 8), int | float)
            or isinstance(given.get(key, 8), bool)
            or given.get(key, 8) <= 0
        ):
            raise ValueError(f"{folder / CONFIG}: {key} must be a number above 0, got {given.get(key)!r}")
    return given


def _read_shapes(folder: Path) -> tuple[dict[str, tuple[int, ...]], str | None]:
    file = folder / WEIGHTS
    if not file.is_file():
        pickled = folder / "adapter_model.bin"
        reason = f"{pickled.name} is a pickle, which could run code: save it as safetensors" if pickled.exists() else ""
        raise ValueError(f"{folder}: there is no {WEIGHTS}" + f", and {reason}" * bool(reason))
    shapes = shapes_of(file)
    with safe_open(file, framework="pt") as weights:
        return shapes, (weights.metadata() or {}).get(BASE_DIGEST)
