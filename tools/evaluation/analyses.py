"""What `tools.evaluate` measures: the analyses that a command line asks for, of one model on one data set."""

import argparse
import functools
import operator
from typing import Any

from storage.shards import ShardedDataset
from tools.evaluation.long_context import context_gain, default_limits, measure, positions
from tools.evaluation.passkey import Passkeys, default_lengths, passkey
from tools.trained import Trained
from training.objective import Masking
from training.scores import scores


def masks(arguments: argparse.Namespace, trained: Trained, dataset: ShardedDataset) -> Masking | None:
    """The masks of validation during training; None for a model that predicts the next token, as all else here does."""
    if trained.model.config.is_causal:
        return None
    if trained.objective is None:
        raise ValueError(f"{arguments.source}/config.json has no objective, which says how tokens are masked: add it")
    for flag, asked in (("--context-gain", arguments.context_gain), ("--passkey", arguments.passkey)):
        if asked:
            raise ValueError(f"{flag} is for models that predict the next token; {trained.name} predicts masked ones")
    return Masking(trained.objective, trained.model.config, dataset.manifest, seed=0, purpose="validation")


def passkey_lengths(asked: list[int] | None, shortest: int, row_tokens: int, positions: int) -> list[int]:
    """Those asked for, or those of the default ones that have room for a key."""
    lengths = sorted(set(asked or default_lengths(min(row_tokens, positions))))
    if lengths[-1] > positions:
        raise ValueError(f"--passkey-lengths {lengths[-1]}: the model has positions for {positions} tokens")
    if not asked:
        lengths = [length for length in lengths if length >= shortest] or lengths[-1:]
    if lengths[0] < shortest:
        raise ValueError(
            f"a text of {lengths[0]} tokens has no room for a pass key, which takes {shortest} tokens with its question "
            "and a little filler: give longer --passkey-lengths"
        )
    return lengths


def evaluated(
    arguments: argparse.Namespace, trained: Trained, dataset: ShardedDataset, masking: Masking | None
) -> dict[str, Any]:
    """The figures of every analysis that was asked for, JSON-able."""
    model, row_tokens, read = trained.model, dataset.manifest.seq_length, arguments.max_samples
    if arguments.passkey:
        options = arguments.passkey_language, arguments.passkey_candidates, arguments.seed, read
        passkeys = Passkeys(trained.tokenizer, dataset, *options)
        asked, most = arguments.passkey_lengths, model.config.max_position_embeddings
        lengths = passkey_lengths(asked, passkeys.shortest, row_tokens, most)
    limits: list[int] = []
    if arguments.context_gain:
        limits = sorted(set(arguments.context_limits or default_limits(row_tokens)))
    how = arguments.batch_samples, read, limits, masking
    losses = {name: measure(model, dataset, name, *how) for name in dataset.sources}
    sums = {name: (found.full.total, found.full.targets) for name, found in losses.items()}
    summed = {name: scores(dataset, *of_source, [name], masking) for name, of_source in sums.items()}
    if len(losses) > 1:
        losses["all"] = every = functools.reduce(operator.add, losses.values())
        summed["all"] = scores(dataset, every.full.total, every.full.targets, masking=masking)
    analyses: dict[str, Any] = {"scores": summed, "positions": positions(losses)}
    if limits:
        analyses["context_gain"] = context_gain(losses)
    if arguments.passkey:
        analyses["passkey"] = passkey(model, passkeys, lengths, arguments.passkey_depths, arguments.passkey_trials)
    return analyses
