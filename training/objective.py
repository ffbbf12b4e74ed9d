"""What the model is asked for: the next token, or the tokens behind masks.

Masks are drawn per sample: those of sample k are a pure function of (seed, data set, k), whatever rank reads it in which
layout. The first token of a document, the tokens that mark its beginning and end, context from an overlap, padding, and of a
conversation all that the assistant does not write are never masked.
"""

import hashlib

import numpy as np
import torch

from model.config import ModelConfig
from storage.manifest import Manifest, TokenizerInfo
from training.batch import Batch
from training.config import Recipe
from training.sections import ObjectiveConfig

NO_TARGET = -100
GOLDEN = (5**0.5 - 1) / 2
"""Steps of this length, modulo 1, fill [0, 1) more evenly than random draws: of all t, few batches get only small ones."""


def mask_token_id(tokenizer: TokenizerInfo, model: ModelConfig) -> int:
    """The tokenizer's mask token, or the first id that only the model knows. Raises ValueError where neither exists."""
    if tokenizer.mask_id is not None:
        return tokenizer.mask_id
    if model.vocab_size > tokenizer.vocab_size:
        return tokenizer.vocab_size
    raise ValueError(
        f"the tokenizer has no mask token: set model.vocab_size to at least {tokenizer.vocab_size + 1}, so that there is an "
        "id for one"
    )


class Masking:
    """Masks the batches of one data set. `purpose` separates the draws of training from those of validation."""

    def __init__(
        self, objective: ObjectiveConfig, model: ModelConfig, manifest: Manifest, seed: int, purpose: str
    ) -> None:
        assert objective.masks
        tokenizer = manifest.tokenizer
        self.objective, self.chunk_size = objective, model.chunk_size
        self.mask_id = mask_token_id(tokenizer, model)
        self.boundaries = np.array(tokenizer.control_ids)
        self.replacements = np.setdiff1d(np.arange(tokenizer.vocab_size), self.boundaries)
        digest = hashlib.sha256(f"{manifest.fingerprint}\0{seed}\0mask {purpose}".encode()).digest()
        self.key = int.from_bytes(digest[:8], "little")
        self.offset = int.from_bytes(digest[8:16], "little") / 2**64

    def __call__(self, batch: Batch, samples: np.ndarray) -> Batch:
        """The masked form of a batch of next-token prediction: `samples` int64 [B] are the numbers of its rows.

        `targets` are the tokens behind the masks, `target_weights` float32 [B, T] what each counts; `num_targets` is what
        the weighted sum is divided by: the masked tokens, or where the share is drawn all that might have been.
        """
        ids, positions = batch["input_ids"].numpy(), batch["position_ids"].numpy()
        eligible = self.eligible(batch)
        noised, targets = ids.copy(), np.full_like(ids, NO_TARGET)
        weights = np.zeros(ids.shape, np.float32)
        for row, sample in enumerate(samples.tolist()):
            draws = np.random.Generator(np.random.Philox(key=[self.key, sample]))
            share = self._shares(draws, sample, positions[row])
            masked = eligible[row] & (draws.random(len(share)) < share)
            targets[row, masked] = ids[row, masked]
            weights[row, masked] = 1 / share[masked] if self.objective.drawn else 1.0
            noised[row, masked] = self._replaced(draws, ids[row, masked])
        num_targets = int(eligible.sum() if self.objective.drawn else (targets >= 0).sum())
        if self.objective.copies == 2:
            noised, positions = np.hstack([noised, ids]), np.hstack([positions, positions])
            targets, weights = np.hstack([targets, np.full_like(ids, NO_TARGET)]), np.hstack([weights, 0 * weights])
        return {
            "input_ids": torch.from_numpy(noised),
            "position_ids": torch.from_numpy(positions),
            "targets": torch.from_numpy(targets),
            "num_targets": num_targets,
            "target_weights": torch.from_numpy(weights),
            "copies": self.objective.copies,
        }

    def eligible(self, batch: Batch) -> np.ndarray:
        """Which tokens of a batch of next-token prediction may be masked, bool [B, T]."""
        following = batch["targets"].numpy()
        eligible = np.zeros(following.shape, bool)
        eligible[:, 1:] = following[:, :-1] >= 0  # a target of causal training: neither context nor a first token
        return eligible & ~np.isin(batch["input_ids"].numpy(), self.boundaries)

    def _shares(self, draws: np.random.Generator, sample: int, positions: np.ndarray) -> np.ndarray:
        """The probability of a mask for each token of a row, float64 [T], never 0."""
        low, high = self.objective.ratios
        if self.objective.name == "block_diffusion":
            chunk = np.cumsum(positions % self.chunk_size == 0) - 1
            place = (draws.random() + chunk * GOLDEN) % 1
        else:
            place = np.full(len(positions), (self.offset + sample * GOLDEN) % 1)
        return high - (high - low) * place

    def _replaced(self, draws: np.random.Generator, ids: np.ndarray) -> np.ndarray:
        kind = draws.random(len(ids))
        random, keep = self.objective.random_ratio, self.objective.keep_ratio
        noise = self.replacements[(draws.random(len(ids)) * len(self.replacements)).astype(np.int64)]
        return np.where(kind < random, noise, np.where(kind < random + keep, ids, self.mask_id))


def recipe_masking(recipe: Recipe, manifest: Manifest, purpose: str, seed: int | None = None) -> Masking | None:
    """How batches of a data set are masked; None where they are not. `seed`: the recipe's by default."""
    if not recipe.objective.masks:
        return None
    return Masking(recipe.objective, recipe.model, manifest, recipe.training.seed if seed is None else seed, purpose)
