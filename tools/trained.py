"""Open what training made: a run's checkpoint in any ZeRO stage, or an exported Hugging Face folder."""

import json
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import ValidationError

from data_prep.tokenizer import Tokenizer, open_tokenizer
from engine.checkpoint.folder import find
from engine.checkpoint.manifest import CheckpointManifest
from engine.run.whole_weights import read_adapters, read_base
from model.adapter_config import AdaptersConfig
from model.config import ModelConfig
from model.hf.weights import load_model
from model.llama import Llama
from model.merging import merged
from tools.model_flags import adapter_shares
from training.objective import mask_token_id
from training.sections import ObjectiveConfig


class Trained(NamedTuple):
    model: Llama
    tokenizer: Tokenizer
    name: str
    checkpoint: str | None = None
    """Name of the run's checkpoint; None for an exported model."""
    objective: ObjectiveConfig | None = ObjectiveConfig()
    """What the model was trained for; None where a model that is not causal does not say."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def mask_id(self) -> int:
        """Raises ValueError where neither the tokenizer nor the model has a mask token."""
        return mask_token_id(self.tokenizer.info(""), self.model.config)


def open_trained(source: str, step: int | None, device: str | None, dtype: str, adapter: str | None = None) -> Trained:
    """A model in evaluation mode and the tokenizer it was trained with.

    `source`: a run's folder (`step`: which checkpoint, the newest good one by default) or a Hugging Face folder. `device`
    None: the GPU where there is one. `dtype`: torch's name. `adapter`: of a run with adapters, which are to be part of the
    model's matrices (see `tools.model_flags`), "base" for none, or "mixture" for a model that mixes the likelihoods of all.
    Raises ValueError when it is neither, or damaged, or when this machine has no such device.
    """
    folder, device = Path(source), usable(device)
    if (folder / "config.json").is_file():
        if step is not None:
            raise ValueError(f"--step {step} has no meaning for the exported model {folder}")
        if adapter is not None:
            raise ValueError(f"--adapter {adapter} has no meaning for the exported model {folder}")
        model, tokenizer, name = load_model(folder, getattr(torch, dtype), device), open_tokenizer(folder), folder.name
        checkpoint_name, objective = None, remembered_objective(folder / "config.json", model.config)
    else:
        checkpoint, manifest = find(folder, step)
        shares = shares_of(adapter, manifest)
        model = load_checkpoint(checkpoint, manifest, getattr(torch, dtype), device, shares)
        name = f"{folder.name}/{checkpoint.name}" + f" {adapter}" * (adapter is not None)
        checkpoint_name, objective = checkpoint.name, objective_of(manifest)
        tokenizer = open_tokenizer(folder / manifest.data["tokenizer"]["file"])
    return Trained(model.eval(), tokenizer, name, checkpoint_name, objective)


def usable(device: str | None) -> str:
    """The device that was asked for, or the GPU where there is one; ValueError when this machine has no such."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def objective_of(manifest: CheckpointManifest) -> ObjectiveConfig:
    """What a checkpoint was trained for."""
    return ObjectiveConfig.model_validate(manifest.recipe.get("objective", {}))


def remembered_objective(file: Path, config: ModelConfig) -> ObjectiveConfig | None:
    """That of an exported model; of masked models `tools.export` writes it into `config.json`."""
    if config.is_causal:
        return ObjectiveConfig()
    found = json.loads(file.read_text(encoding="utf-8")).get("objective")
    try:
        return None if found is None else ObjectiveConfig.model_validate(found)
    except ValidationError as error:
        raise ValueError(f"{file}: objective: {error.errors()[0]['msg']}") from None


def shares_of(adapter: str | None, manifest: CheckpointManifest) -> dict[str, float] | None:
    """How much of each of a run's adapters `--adapter` asks for; None: their mixture. Raises ValueError where the run has other
    adapters, or none."""
    names = ModelConfig.model_validate(manifest.recipe["model"]).adapters.names
    if adapter is None and names:
        raise ValueError(f"this run has the adapters {', '.join(names)}: choose with --adapter NAME, mixture or base")
    if adapter is not None and not names:
        raise ValueError(f"--adapter {adapter}: this run has no adapters: leave it out")
    if adapter == "mixture":
        return None
    return {} if adapter in (None, "base") else adapter_shares("--adapter", str(adapter), names)


def adapters_of(manifest: CheckpointManifest) -> AdaptersConfig:
    """Those of a checkpoint's run, with the prior that it has learned, if it does."""
    adapters = ModelConfig.model_validate(manifest.recipe["model"]).adapters
    if manifest.prior is None:
        return adapters
    return adapters.with_prior(torch.tensor(manifest.prior.logits, dtype=torch.float64).softmax(-1).tolist())


def load_checkpoint(
    folder: Path, manifest: CheckpointManifest, dtype: torch.dtype, device: str, shares: Mapping[str, float] | None
) -> Llama:
    """The weights of a checkpoint in one plain model, a parameter at a time. `shares`: of adapters to merge; None: the model
    keeps all of them, for their mixture."""
    whole = ModelConfig.model_validate(manifest.recipe["model"])
    of_all = adapters_of(manifest).model_copy(update={"mode": "mixture"})
    config = whole.model_copy(update={"adapters": of_all if shares is None else AdaptersConfig()})
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    model = model.to_empty(device=device)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    parameters, weights = dict(model.named_parameters()), read_base(folder, manifest)
    if shares is None:
        weights = chain(weights, read_adapters(folder, manifest).items())
    elif shares:
        weights = merged(weights, whole.adapters, read_adapters(folder, manifest), shares)
    with torch.no_grad():
        for name, tensor in weights:
            if name in parameters:
                parameters.pop(name).copy_(tensor)
    assert not parameters, f"{folder} lacks {sorted(parameters)}"
    return model
