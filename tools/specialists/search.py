"""Sections that look for the page that they were taken from: by the vectors of base and adapters, and by words (BM25).

Pages are those of Python's documentation. Of each, every second section is a query, with its beginning alone, and the page
without these sections is the document that it should find. Pages that are held out are searched; of the others an adapter
learns which of their sections belong together.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from console.progress import say
from tools.embedding import Embedder, Pooling
from tools.evaluation.retrieval import Pairs, by_vectors, by_words
from tools.specialists.domains import routed
from tools.specialists.questions import LONGEST_CONTEXT, Question, sections, write_questions
from tools.specialists.results import Figure, Results
from tools.specialists.texts import Page, is_held_out, python
from tools.specialists.trainings import RECIPES, Training, Workshop
from tools.trained import open_trained

EVERY = 2
BATCH_TOKENS = 4096
RANK = 16
PAIRS = "--prompt-field", "prompt", "--response-field", "response", "--chat-template", "recipes/pairs.jinja"
PREDICTS, SEARCHES = "adapter that predicts", "adapter that searches"


def parted(text: str) -> tuple[list[str], list[str]]:
    """The sections that a page keeps, and those that look for it."""
    prose = [body for _, body in sections(text)]
    return [body for place, body in enumerate(prose) if place % EVERY != EVERY - 1], prose[EVERY - 1 :: EVERY]


def beginning(section: str) -> str:
    return section[:LONGEST_CONTEXT].rsplit(" ", 1)[0]


def pairs_of(pages: Iterable[Page], most: int) -> Pairs:
    """Of the pages that are held out and have enough sections; at most so many queries."""
    found: list[tuple[str, str]] = []
    for name, text in pages:
        kept, asked = parted(text)
        if is_held_out(name):
            found += [(beginning(body), "\n\n".join(kept)) for body in asked]
    if not found:
        raise ValueError("no page is held out that has sections to search with")
    first = sorted(found, key=lambda pair: zlib.crc32(pair[0].encode()))[:most]
    return Pairs.of([query for query, _ in first], [document for _, document in first])


def pairs_to_learn(pages: Iterable[Page]) -> Iterator[Question]:
    """Of the other pages: the beginnings of two sections that follow one another."""
    for name, text in pages:
        if not is_held_out(name):
            for kept, asked in zip(*parted(text), strict=False):
                yield Question(name, beginning(asked), beginning(kept), "")


def compare(workshop: Workshop, base: Path, data: Path, sources: Sequence[str]) -> Results:
    """Adapters that have learned to predict Python's documentation, and to search in it."""
    pairs, settings = pairs_of(python(workshop.work), workshop.settings.questions), workshop.settings
    runs = trained(workshop, base, data, sources)
    rows = {"BM25": [by_words(pairs).figures()]}

    def search(name: str, run: Path, adapter: str, pooling: Pooling) -> None:
        say(f"search: {len(pairs.queries)} queries, {run.name}, {name}, {pooling}")
        opened = open_trained(str(run), None, None, "float32", adapter)
        embed = Embedder(opened, pooling, settings.seq_length, BATCH_TOKENS)
        rows.setdefault(f"{name}, {pooling}", []).append(by_vectors(embed, pairs).figures())

    poolings: tuple[Pooling, ...] = ("mean", "last")
    for seed in range(1, settings.seeds + 1):
        for pooling in poolings:
            if seed == 1:
                search("base", runs["routed-1"], "base", pooling)
            search(PREDICTS, runs[f"routed-{seed}"], "python", pooling)
        search(SEARCHES, runs[f"search-{seed}"], "finder", "mean")
    figures = {name: {c: Figure([one[c] for one in found]) for c in found[0]} for name, found in rows.items()}
    title = f"search: {len(pairs.queries)} held-out sections, {len(pairs.documents)} documents"
    return Results(title, list(rows["BM25"][0]), figures, 3)


def trained(workshop: Workshop, base: Path, data: Path, sources: Sequence[str]) -> dict[str, Path]:
    """Runs of both kinds of adapters by their names."""
    file = workshop.work / "pairs" / "python.jsonl"
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        write_questions(list(pairs_to_learn(python(workshop.work))), file)
    of_pairs = workshop.data("pairs", [file], *PAIRS, "--validation-fraction", 0)
    finder = {"names": ["finder"], "r": RANK, "lora_alpha": 2 * RANK}
    wanted = {}
    for seed in range(1, workshop.settings.seeds + 1):
        wanted[f"routed-{seed}"] = routed(workshop, base, data, sources, seed)
        wanted[f"search-{seed}"] = Training(
            of_pairs, RECIPES / "search.yaml", workshop.settings.search_steps, finder, base, seed
        )
    return dict(zip(wanted, workshop.trainings(wanted), strict=True))
