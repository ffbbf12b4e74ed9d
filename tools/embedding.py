"""Vectors of texts from a model's hidden states, long texts window by window.

A text's tokens are cut into windows without overlap, each of which the model reads as a document of its own, with the token
that begins a document where its tokenizer has one. Windows have one vector each: the mean of the last hidden states (after
the final norm) over their tokens without the beginning, or that of the last token, scaled to length 1. Several windows are
read at once as documents of one row, which attention does not cross: there is no padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from console.progress import Progress
from data_prep.documents import read_unit
from data_prep.find import Source
from data_prep.records import Document, Problems
from data_prep.sources import plan_units
from model.documents import Documents
from tools.trained import Trained

Pooling = Literal["mean", "last"]


class Window(NamedTuple):
    key: str
    """Of the text that it is from."""
    start: int
    end: int
    """Characters of the text, from and to (exclusive)."""
    ids: np.ndarray
    """int [n], without the token that begins a document."""


class Vectors(NamedTuple):
    keys: list[str]
    """Of the texts, once for each of their windows."""
    spans: np.ndarray
    """int64 [N, 2], characters of the text, from and to (exclusive)."""
    vectors: np.ndarray
    """float32 [N, D] of length 1."""

    starts: np.ndarray
    """int64 [texts], the first window of each text; its others follow."""


class Embedder:
    """How texts become vectors."""

    def __init__(self, trained: Trained, pooling: Pooling, window_tokens: int, batch_tokens: int) -> None:
        """`window_tokens`: of the longest window, its beginning included. `batch_tokens`: of windows that are read at once, at
        least one. Raises ValueError where the model has no such positions."""
        config = trained.model.config
        if config.adapters.members:
            raise ValueError(
                f"{trained.name} mixes adapters and has no hidden states of its own: choose --adapter NAME"
            )
        self.begin = [] if trained.tokenizer.bos_id is None else [trained.tokenizer.bos_id]
        if window_tokens <= len(self.begin):
            raise ValueError(f"--chunk-tokens {window_tokens}: at least {len(self.begin) + 1}")
        if config.position_embedding != "rope" and window_tokens > config.max_position_embeddings:
            raise ValueError(
                f"--chunk-tokens {window_tokens}: {trained.name} has {config.max_position_embeddings} positions"
            )
        self.trained, self.pooling = trained, pooling
        self.window_tokens, self.batch_tokens = window_tokens, batch_tokens

    def windows(self, document: Document) -> Iterator[Window]:
        """Those of a text, none of one without tokens. The first begins at character 0, each ends where the next begins."""
        ids, offsets = self.trained.tokenizer.encode_with_offsets(document.text)
        step = self.window_tokens - len(self.begin)
        begins = [0, *(int(offsets[at, 0]) for at in range(step, len(ids), step)), len(document.text)]
        for number, at in enumerate(range(0, len(ids), step)):
            yield Window(document.key, begins[number], begins[number + 1], ids[at : at + step])

    def __call__(self, documents: Iterable[Document], progress: Progress | None = None) -> Vectors:
        """Of texts in their order. Raises ValueError where a text has no tokens, or there is none."""
        windows: list[Window] = []
        waiting: list[Window] = []
        vectors: list[np.ndarray] = []
        starts: list[int] = []
        for document in documents:
            starts.append(len(windows))
            for window in self.windows(document):
                windows.append(window._replace(ids=np.empty(0)))
                if waiting and sum(map(self._length, [*waiting, window])) > self.batch_tokens:
                    vectors.append(self._read(waiting))
                    waiting = []
                waiting.append(window)
            if len(windows) == starts[-1]:
                raise ValueError(f"document {document.key} has no text that a vector could be made of: leave it out")
            if progress is not None:
                progress.advance(len(document.text.encode()))
        if waiting:
            vectors.append(self._read(waiting))
        if not vectors:
            raise ValueError("the input holds no documents")
        spans = np.array([(window.start, window.end) for window in windows], np.int64)
        return Vectors([window.key for window in windows], spans, np.concatenate(vectors), np.array(starts))

    def _length(self, window: Window) -> int:
        return len(self.begin) + len(window.ids)

    @torch.inference_mode()
    def _read(self, windows: list[Window]) -> np.ndarray:
        lengths, device = [self._length(window) for window in windows], self.trained.device
        ids = np.concatenate([part for window in windows for part in (self.begin, window.ids)]).astype(np.int64)
        positions = torch.cat([torch.arange(length) for length in lengths])
        documents = Documents.from_position_ids(positions[None], device)
        hidden = self.trained.model.hidden_states(torch.from_numpy(ids)[None].to(device), documents)[0]
        parts = [part[len(self.begin) :] for part in hidden.float().split(lengths)]
        pooled = [part.mean(0) if self.pooling == "mean" else part[-1] for part in parts]
        return F.normalize(torch.stack(pooled), dim=-1).cpu().numpy()


class Input(NamedTuple):
    """Files of documents, as `data_prep.build` reads them: the first problem is an error."""

    places: tuple[str, ...]
    text_field: str
    id_field: str | None = None

    def documents(self) -> Iterator[Document]:
        units, files, _ = self._plan()
        for unit in units:
            yield from read_unit(unit, files, self.text_field, self.id_field, Problems("fail"))

    def size(self) -> int:
        """Bytes of the files."""
        return sum(file.size for file in self._plan()[1])

    def _plan(self) -> Any:
        return plan_units([Source("documents", None, self.places)])
