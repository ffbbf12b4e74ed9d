"""Sections that look for the page that they were taken from: by the vectors of base and adapter, and by words (BM25).

Pages are those of Python's documentation that are held out. Of each, every second section is a query, with its beginning alone,
and the page without these sections is the document that it should find.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from console.progress import say
from tools.embedding import Embedder, Pooling
from tools.evaluation.retrieval import Pairs, by_vectors, by_words
from tools.specialists.domains import routed
from tools.specialists.questions import LONGEST_CONTEXT, sections
from tools.specialists.results import Figure, Results
from tools.specialists.texts import Page, is_held_out, python
from tools.specialists.trainings import Workshop
from tools.trained import open_trained

EVERY = 2
BATCH_TOKENS = 4096
POOLINGS: tuple[Pooling, ...] = ("mean", "last")


def pairs_of(pages: Iterable[Page], most: int) -> Pairs:
    """Of the pages that are held out and have enough sections; at most so many queries."""
    found: list[tuple[str, str]] = []
    for name, text in pages:
        prose = [body for _, body in sections(text)]
        asked = prose[EVERY - 1 :: EVERY]
        if is_held_out(name) and asked:
            document = "\n\n".join(body for place, body in enumerate(prose) if place % EVERY != EVERY - 1)
            found += [(body[:LONGEST_CONTEXT].rsplit(" ", 1)[0], document) for body in asked]
    if not found:
        raise ValueError("no page is held out that has sections to search with")
    kept = sorted(found, key=lambda pair: zlib.crc32(pair[0].encode()))[:most]
    return Pairs.of([query for query, _ in kept], [document for _, document in kept])


def compare(workshop: Workshop, base: Path, data: Path, sources: Sequence[str]) -> Results:
    """The adapter has learned to predict Python's documentation; nothing has learned to search."""
    pairs, settings = pairs_of(python(workshop.work), workshop.settings.questions), workshop.settings
    wanted = {f"routed-{seed}": routed(workshop, base, data, sources, seed) for seed in range(1, settings.seeds + 1)}
    rows = {"BM25": [by_words(pairs).figures()]}
    for number, run in enumerate(workshop.trainings(wanted)):
        for adapter in ("base",) * (number == 0) + ("python",):
            trained = open_trained(str(run), None, None, "float32", adapter)
            for pooling in POOLINGS:
                say(f"search: {len(pairs.queries)} queries, {run.name}, {adapter}, {pooling}")
                embed = Embedder(trained, pooling, settings.seq_length, BATCH_TOKENS)
                name = f"{'base' if adapter == 'base' else 'adapter'}, {pooling}"
                rows.setdefault(name, []).append(by_vectors(embed, pairs).figures())
    figures = {name: {c: Figure([one[c] for one in found]) for c in found[0]} for name, found in rows.items()}
    title = f"search: {len(pairs.queries)} held-out sections, {len(pairs.documents)} documents"
    return Results(title, list(rows["BM25"][0]), figures, 3)
