"""Bits per byte of four kinds of text, by what has learned them: with labels, without, each for itself, or all in one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from data_prep.tokenizer import open_tokenizer
from engine.checkpoint.folder import find
from model.llama import Llama
from model.merge_ways import WAYS, equal_shares
from storage.shards import ShardedDataset, open_split
from tools.evaluation.domains import AdaptedBase, Sample, open_adapted
from tools.evaluation.learned_shares import learned_shares
from tools.specialists.likelihoods import Likelihoods, bits_per_byte, measure, open_members
from tools.specialists.metrics import normalised_mutual_information
from tools.specialists.results import Figure, Results
from tools.specialists.seeding import write_groups
from tools.specialists.trainings import RECIPES, Training, Workshop
from tools.trained import usable

CLOSE_ENOUGH = 0.005
"""Bits per byte between the mixture of whole documents and the best single adapter."""
FOUND = 0.9
"""Normalised mutual information from which on sources count as found."""
RANK = 8
HOW = {"r": RANK, "lora_alpha": 2 * RANK}
LEARNING_ROWS = 40
"""Of each source's training rows, on which weights of a merge are learned."""
WITHOUT_LABELS = "learned without labels, g = 1", "learned without labels, g = 0"


def compare(workshop: Workshop, base: Path, data: Path, sources: list[str]) -> Results:
    """Train what is compared and measure it on the validation documents of `data`."""
    settings, recipe = workshop.settings, RECIPES / "adapters.yaml"
    one = {"names": ["all"], "r": RANK * len(sources), "lora_alpha": 2 * RANK * len(sources), "mode": "single"}
    seeds = range(1, settings.seeds + 1)
    wanted = {}
    for seed in seeds:
        wanted[f"routed-{seed}"] = routed(workshop, base, data, sources, seed)
        wanted[f"single-{seed}"] = Training(data, recipe, settings.adapter_steps, one, base, seed)
    runs = dict(zip(wanted, workshop.trainings(wanted), strict=True))
    finders = [f"adapter-{number}" for number in range(1, len(sources) + 1)]
    mixtures = trained_without_labels(workshop, base, data, {"names": finders} | HOW)
    dataset, train = open_split(data, "validation"), open_split(data, "train")
    of_seeds, found = [], []
    for seed, mixture in zip(seeds, mixtures, strict=True):
        of_seeds.append(figures(dataset, train, runs[f"routed-{seed}"], runs[f"single-{seed}"]))
        ways, shared = figures_without_labels(dataset, mixture)
        of_seeds[-1] |= ways
        found.append(shared)
    return judged(of_seeds, found, sources)


def routed(workshop: Workshop, base: Path, data: Path, sources: Sequence[str], seed: int) -> Training:
    """An adapter for each source."""
    adapters = {"names": list(sources)} | HOW
    return Training(data, RECIPES / "adapters.yaml", workshop.settings.adapter_steps, adapters, base, seed)


def trained_without_labels(workshop: Workshop, base: Path, data: Path, adapters: dict[str, Any]) -> list[Path]:
    """A run of mode mixture for each seed, from adapters that a few steps on groups of documents have told apart."""
    settings, seeds = workshop.settings, range(1, workshop.settings.seeds + 1)
    tokenizer, train = open_tokenizer(base), open_split(data, "train")
    beginnings = {}
    for seed in seeds:
        folder = workshop.work / "groups" / str(seed)
        files = [folder / f"{name}.jsonl" for name in adapters["names"]]
        if not all(file.exists() for file in files):
            files = write_groups(tokenizer, train, adapters["names"], settings.grouped_rows, seed, folder)
        groups = workshop.data(f"groups-{seed}", files, "--validation-fraction", 0)
        beginnings[f"beginnings-{seed}"] = Training(
            groups, RECIPES / "adapters.yaml", settings.grouped_steps, adapters, base, seed
        )
    wanted = {}
    for seed, run in zip(seeds, workshop.trainings(beginnings), strict=True):
        folder = workshop.exported(run, workshop.work / "beginnings" / str(seed), "--adapters", "separate")
        begun = {"mode": "mixture", "initial_weights": {name: str(folder / name) for name in adapters["names"]}}
        wanted[f"mixture-{seed}"] = Training(
            data, RECIPES / "mixture.yaml", settings.mixture_steps, adapters | begun, base, seed
        )
    return workshop.trainings(wanted)


def figures_without_labels(dataset: ShardedDataset, run: Path) -> tuple[dict[str, dict[str, float]], float]:
    """Bits per byte by way and source under the mixture that a run learned; what its adapters and the sources have in common."""
    table: dict[str, dict[str, float]] = {way: {} for way in WITHOUT_LABELS}
    model, names = open_members(run)
    true, chosen = [], []
    for source in dataset.sources:
        found = measure(model, dataset, source, list(range(len(names))))
        for way, loss in zip(WITHOUT_LABELS, (found.mixed(1.0), found.mixed(0.0)), strict=True):
            table[way][source] = bits_per_byte(dataset, source, loss, found.targets)
        likeliest = found.likeliest()
        chosen += likeliest
        true += [source] * len(likeliest)
    return table, normalised_mutual_information(true, chosen)


def figures(dataset: ShardedDataset, train: ShardedDataset, routed: Path, single: Path) -> dict[str, dict[str, float]]:
    """Bits per byte by way and source, of one seed."""
    table: dict[str, dict[str, float]] = {}

    def note(way: str, source: str, loss: float, found: Likelihoods) -> None:
        table.setdefault(way, {})[source] = bits_per_byte(dataset, source, loss, found.targets)

    model, names = open_members(routed)
    for source in dataset.sources:
        everything = measure(model, dataset, source, [None, *range(len(names))])
        found = everything._replace(log_likelihoods=everything.log_likelihoods[1:])
        of_base, *of_members = everything.of_members()
        note("base", source, of_base, found)
        note("routed to its own", source, of_members[names.index(source)], found)
        note("best single adapter", source, min(of_members), found)
        note("mixture, g = 0", source, found.mixed(0.0), found)
        note("mixture, g = 1", source, found.mixed(1.0), found)
    model, _ = open_members(single)
    for source in dataset.sources:
        found = measure(model, dataset, source, [0])
        note("one of the summed rank", source, found.of_members()[0], found)
    for way, merged in merges(open_adapted(*find(routed), torch.float32, usable(None)), train):
        for source in dataset.sources:
            found = measure(merged, dataset, source, [0])
            note(f"merged: {way}", source, found.of_members()[0], found)
    return table


def merges(adapted: AdaptedBase, train: ShardedDataset) -> Iterator[tuple[str, Llama]]:
    """Models that all the adapters have become, by the way; each adapter counts 1 in a sum, 1 / N in the others or what it has
    learned to."""
    names = adapted.adapters.names
    yield "sum", adapted.merged("cat", dict.fromkeys(names, 1.0))
    for way in WAYS:
        yield "mean" if way == "cat" else way, adapted.merged(way, equal_shares(names, way))
    for what, by_layer in (("adapter", False), ("layer", True)):
        start, rows = equal_shares(names, "cat"), Sample(LEARNING_ROWS)
        shares = learned_shares(adapted, train, rows, start, by_layer, batch_samples=1)
        yield f"a weight for each {what}, learned", adapted.merged("cat", shares)


def judged(of_seeds: list[dict[str, dict[str, float]]], found: list[float], sources: list[str]) -> Results:
    """The table, and whether what has to hold does, in every seed; `found`: of adapters without labels and the sources."""
    rows = {
        way: {source: Figure([seed[way][source] for seed in of_seeds]) for source in sources} for way in of_seeds[0]
    }

    def most(way: str, other: str) -> float:
        """By how much `way` is above `other` at the most."""
        return max(seed[way][source] - seed[other][source] for seed in of_seeds for source in sources)

    gain, loss = -most("routed to its own", "base"), most("mixture, g = 1", "best single adapter")
    statements = [
        f"routed to its own adapter every source is better than under the base, by {gain:.3f} at least: {_said(gain > 0)}",
        f"the mixture with g = 1 is at most {loss:.4f} above the best single adapter of a source, {CLOSE_ENOUGH} are "
        f"allowed: {_said(loss <= CLOSE_ENOUGH)}",
        f"documents of the sources and the likeliest adapters that had no labels: normalised mutual information "
        f"{', '.join(f'{each:.3f}' for each in found)}, from {FOUND} on they are found: {_said(min(found) >= FOUND)}",
    ]
    return Results("bits per byte", sources, rows, 3, statements)


def _said(holds: bool) -> str:
    return "yes" if holds else "NO"
