"""Which adapter the rows of a data set have: the one that is called as their source is."""

import numpy as np

from model.adapter_config import AdaptersConfig
from storage.shards import ShardedDataset


def adapters_of_sources(adapters: AdaptersConfig, dataset: ShardedDataset) -> np.ndarray | None:
    """By the place of a source in `dataset.sources`: the place of its adapter in `adapters.names`, int64; None: no adapters, or
    all of them for all rows."""
    if not adapters.names or adapters.members:
        return None
    if adapters.mode == "single":
        return np.zeros(len(dataset.sources), np.int64)
    return np.array([adapters.names.index(source) for source in dataset.sources])


def routing_problems(adapters: AdaptersConfig, dataset: ShardedDataset) -> list[str]:
    """Why rows of a split cannot find their adapters."""
    if not adapters.names or adapters.mode != "routed":
        return []
    return [
        f"adapters: no adapter is called {source!r} as a source of {dataset.directory} is: name one so, or build the data "
        "without it"
        for source in dataset.sources
        if source not in adapters.names
    ]


def idle_problems(adapters: AdaptersConfig, training: list[ShardedDataset]) -> list[str]:
    """Why some adapters would never see a row of the training data."""
    if adapters.mode != "routed":
        return []
    known = {source for dataset in training for source in dataset.sources}
    return [
        f"adapters: {name!r} has nothing to learn from: the sources of the data are {', '.join(sorted(known))}"
        for name in adapters.names
        if name not in known
    ]
