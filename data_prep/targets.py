"""Which tokens carry loss, where not all do: stretches of tokens of documents, and of the pieces that these are cut into."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Spans(NamedTuple):
    """Stretches of tokens of N things, from `begin` to `end` (exclusive): thing i has those of splits[i]:splits[i + 1].

    Those of a thing ascend, and none is empty or touches the next.
    """

    splits: np.ndarray  # int64 [N + 1]
    begin: np.ndarray  # int64 [spans]
    end: np.ndarray  # int64 [spans]

    @property
    def tokens(self) -> int:
        return int((self.end - self.begin).sum())

    def select(self, things: np.ndarray) -> "Spans":
        """The spans of these things, in their order."""
        counts = np.diff(self.splits)[things]
        splits = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        index = np.arange(splits[-1]) + np.repeat(self.splits[things] - splits[:-1], counts)
        return Spans(splits, self.begin[index], self.end[index])

    def clip(self, low: np.ndarray, high: np.ndarray) -> "Spans":
        """What lies between tokens low[i] and high[i] (exclusive) of each thing."""
        counts = np.diff(self.splits)
        begin = np.maximum(self.begin, np.repeat(low, counts))
        end = np.minimum(self.end, np.repeat(high, counts))
        kept = begin < end
        before = np.concatenate([[0], np.cumsum(kept)]).astype(np.int64)
        return Spans(before[self.splits], begin[kept], end[kept])


def spans_of(masks: Sequence[np.ndarray]) -> Spans:
    """The stretches in which each of the masks (bool [its tokens]) holds."""
    counts, edges = [0], []
    for mask in masks:
        changes = np.flatnonzero(np.diff(mask, prepend=False, append=False)).reshape(-1, 2)
        counts.append(len(changes))
        edges.append(changes)
    pairs = np.concatenate(edges) if edges else np.zeros((0, 2), np.int64)
    return Spans(np.cumsum(counts, dtype=np.int64), pairs[:, 0], pairs[:, 1])


def joined(parts: Sequence[Spans]) -> Spans:
    """The spans of the things of all parts, one part after the other."""
    counts = np.concatenate([np.zeros(1, np.int64), *(np.diff(part.splits) for part in parts)])
    begin, end = (np.concatenate([np.zeros(0, np.int64), *(part[column] for part in parts)]) for column in (1, 2))
    return Spans(np.cumsum(counts), begin, end)


def problem_of(spans: Spans, possible: Spans) -> str | None:
    """Why these cannot be spans of things of which only the tokens of `possible` may carry loss, or None."""
    thing = np.repeat(np.arange(len(spans.splits) - 1), np.diff(spans.splits))
    if np.any(spans.begin >= spans.end) or np.any((spans.end[:-1] >= spans.begin[1:]) & (thing[1:] == thing[:-1])):
        return "are empty, or do not ascend"
    stride = max(spans.end.max(initial=0), possible.end.max(initial=0)) + 1  # a thing behind the other on one line
    lines = stride * np.repeat(np.arange(len(possible.splits) - 1), np.diff(possible.splits))
    index = np.searchsorted(lines + possible.begin, stride * thing + spans.begin, side="right") - 1
    if (
        np.any(spans.begin < 0)
        or np.any(index < 0)
        or np.any(stride * thing + spans.end > (lines + possible.end)[index])
    ):
        return "are outside of what can carry loss"
    return None
