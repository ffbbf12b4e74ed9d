"""How often the right document is found for a query: by vectors, and by BM25 (Robertson and Zaragoza 2009) beside them.

Documents that are equal are one document. A document's score is that of its best window; a query longer than a window is its
first one. Of documents with equal scores the right one comes last, so that a score which tells nothing apart finds nothing.

Legend: Q queries, D documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_prep.records import Document
from tools.embedding import Embedder, Input

CUTOFFS = (1, 5, 10)
QUERIES_AT_ONCE = 256


class Pairs(NamedTuple):
    queries: list[str]
    documents: list[str]
    """All that are different, in the order in which they come first."""
    right: np.ndarray
    """int64 [Q]: place of each query's document."""

    @classmethod
    def read(cls, places: Sequence[str], query_field: str, document_field: str) -> Pairs:
        """From records with two fields, in any format of `data_prep.build`. Raises ValueError."""
        if query_field == document_field:
            raise ValueError(f"--query-field and --document-field both name {query_field!r}: name two fields")
        queries, documents = (
            [document.text for document in Input(tuple(places), field).documents()]
            for field in (query_field, document_field)
        )
        if not queries:
            raise ValueError(f"{', '.join(places)}: there are no pairs")
        return cls.of(queries, documents)

    @classmethod
    def of(cls, queries: list[str], documents: Sequence[str]) -> Pairs:
        """A document for each query."""
        for kind, texts in (("query", queries), ("document", documents)):
            if (empty := next((at for at, text in enumerate(texts) if not text.strip()), None)) is not None:
                raise ValueError(f"the {kind} of pair {empty + 1} is empty: leave it out")
        places = {text: place for place, text in enumerate(dict.fromkeys(documents))}
        return cls(queries, list(places), np.array([places[text] for text in documents], np.int64))


class Found(NamedTuple):
    recall: dict[int, float]
    """By k, the share of queries whose document is among the first k."""
    mrr: float
    """Mean of 1 / rank."""

    @classmethod
    def at(cls, ranks: np.ndarray) -> Found:
        """`ranks` int64 [Q], from 1."""
        return cls({k: float((ranks <= k).mean()) for k in CUTOFFS}, float((1 / ranks).mean()))

    def figures(self) -> dict[str, float]:
        return {f"recall@{k}": share for k, share in self.recall.items()} | {"MRR": self.mrr}


def ranks_of(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """int64 [Q], from 1: of the documents `right` int64 [Q] by `scores` [Q, D]."""
    return (scores >= np.take_along_axis(scores, right[:, None], 1)).sum(1)


def by_vectors(embed: Embedder, pairs: Pairs) -> Found:
    documents = embed(Document(str(place), text) for place, text in enumerate(pairs.documents))
    queries = embed(Document(str(place), text) for place, text in enumerate(pairs.queries))
    of_queries = queries.vectors[queries.starts]
    ranks = []
    for at in range(0, len(of_queries), QUERIES_AT_ONCE):
        of_windows = of_queries[at : at + QUERIES_AT_ONCE] @ documents.vectors.T
        scores = np.maximum.reduceat(of_windows, documents.starts, axis=1)
        ranks.append(ranks_of(scores, pairs.right[at : at + QUERIES_AT_ONCE]))
    return Found.at(np.concatenate(ranks))


def by_words(pairs: Pairs) -> Found:
    """BM25 of bm25s as it comes, but without a list of stop words, which is one language's."""
    import bm25s

    def words(texts: list[str]) -> list[list[str]]:
        return bm25s.tokenize(texts, stopwords=[], return_ids=False, show_progress=False)

    index = bm25s.BM25()
    index.index(words(pairs.documents), show_progress=False)
    nothing = np.zeros(len(pairs.documents), np.float32)
    ranks = [
        ranks_of((index.get_scores(query) if query else nothing)[None], pairs.right[at : at + 1])
        for at, query in enumerate(words(pairs.queries))
    ]
    return Found.at(np.concatenate(ranks))
