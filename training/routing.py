"""What rows have by their source: an adapter that is called as it, or a prior over all adapters."""

from typing import NamedTuple

import numpy as np

from model.adapter_config import AdaptersConfig
from storage.shards import ShardedDataset


class Labels(NamedTuple):
    """Of the rows of a data set, by the place of their source in `dataset.sources`."""

    adapters: np.ndarray | None
    """int64, places in `adapters.names`; None: the rows pass through all adapters."""
    sources: np.ndarray | None
    """int64, places among the sources of all that a run reads; None where rows have one adapter."""


def labels_of_sources(adapters: AdaptersConfig, dataset: ShardedDataset, known: tuple[str, ...]) -> Labels | None:
    """None: there are no adapters. `known`: the names of all sources that a run reads."""
    if not adapters.names:
        return None
    if adapters.members:
        return Labels(None, np.array([known.index(source) for source in dataset.sources]))
    if adapters.mode == "single":
        return Labels(np.zeros(len(dataset.sources), np.int64), None)
    return Labels(np.array([adapters.names.index(source) for source in dataset.sources]), None)


def routing_problems(adapters: AdaptersConfig, dataset: ShardedDataset) -> list[str]:
    """Why rows of a split cannot find their adapters, or their prior."""
    if adapters.prior_sources:
        return [
            f"adapters.prior has nothing for {source!r}, a source of {dataset.directory}: add it"
            for source in dataset.sources
            if source not in adapters.prior_sources
        ]
    if not adapters.names or adapters.mode != "routed":
        return []
    return [
        f"adapters: no adapter is called {source!r} as a source of {dataset.directory} is: name one so, or build the data "
        "without it"
        for source in dataset.sources
        if source not in adapters.names
    ]


def idle_problems(adapters: AdaptersConfig, training: list[ShardedDataset]) -> list[str]:
    """Why some adapters would never see a row of the training data, or a prior no source."""
    known = {source for dataset in training for source in dataset.sources}
    rest = f"the sources of the data are {', '.join(sorted(known))}"
    found = [f"adapters.prior: there is no {name!r}: {rest}" for name in adapters.prior_sources if name not in known]
    if adapters.mode == "routed":
        found += [
            f"adapters: {name!r} has nothing to learn from: {rest}" for name in adapters.names if name not in known
        ]
    return found
