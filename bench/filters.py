"""Filters of `data_prep.build` beside datatrove's pipeline of the same filters, on the same text, in one run of three minutes.

    python -m bench.filters [--megabytes 4]

Pieces of about 4,000 characters of the text of `bench.data`, shuffled, in a JSON Lines file: read and filtered, and nothing
written. Every contender runs in its own process, with one worker; CPU seconds after imports, the loading of what a filter needs
included. datatrove has no filter for `characters` and `gzip`: they are its `LambdaFilter` with the same measure. Filters by
language are left out, since their models are downloads.
"""

import json
import random
import tempfile
from bisect import bisect
from collections.abc import Iterator
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

from bench.alone import Figures, megabytes_or_run, run_alone
from bench.data import Stopwatch, documents

BENCH = "bench.filters"
FROM, CHARACTERS = 4, 4000
ALL = "all"
SPECS = "characters=500:", "gzip=0.2:0.8", "gopher-quality", "gopher-repetition", "fineweb", "c4"
SETS = {**{spec: [spec] for spec in SPECS}, ALL: list(SPECS)}
OURS, THEIRS = "longform", "datatrove"


def prepare(folder: Path, megabytes: int) -> Figures:
    pieces = [piece for _, text in documents(FROM * megabytes * 1_000_000) for piece in cut(text)]
    random.Random(0).shuffle(pieces)
    ends = list(accumulate(len(piece.encode()) for piece in pieces))
    found = pieces[: bisect(ends, megabytes * 1_000_000)]
    with (folder / "corpus.jsonl").open("w") as file:
        for number, text in enumerate(found):
            file.write(json.dumps({"id": str(number), "text": text}, ensure_ascii=False) + "\n")
    return {"bytes": ends[len(found) - 1], "documents": len(found)}


def cut(text: str) -> Iterator[str]:
    """Whole paragraphs, about as long together as a page of the web."""
    piece = ""
    for paragraph in text.split("\n\n"):
        piece += paragraph + "\n\n"
        if len(piece) >= CHARACTERS:
            yield piece
            piece = ""
    if piece.strip():
        yield piece


def run_ours(folder: Path, specs: list[str]) -> Figures:
    import datatrove.pipeline.filters  # noqa: F401 (the clock starts after imports)
    import spacy  # noqa: F401

    from data_prep.documents import read_unit
    from data_prep.filters import Filters
    from data_prep.records import Filtered, Problems
    from data_prep.sources import parse_sources, plan_units

    refused: list[Filtered] = []
    with Stopwatch() as watch:
        units, files, _ = plan_units(parse_sources([str(folder / "corpus.jsonl")], []))
        filters = Filters(specs)
        found = chain.from_iterable(read_unit(unit, files, "text", "id", Problems("fail")) for unit in units)
        kept = [document.key.rpartition("/")[2] for document in filters.kept(found, refused)]
    return watch.result | {"kept": kept}


def run_datatrove(folder: Path, specs: list[str]) -> Figures:
    import importlib

    import spacy  # noqa: F401 (the clock starts after imports)
    from datatrove.pipeline.filters import LambdaFilter
    from datatrove.pipeline.readers import JsonlReader

    from data_prep.filters import DATATROVE, MEASURES

    def step(spec: str) -> Any:
        if spec in DATATROVE:
            module, name = DATATROVE[spec]
            return getattr(importlib.import_module(f"datatrove.pipeline.filters.{module}"), name)()
        name, _, limits = spec.partition("=")
        low, high = (float(limit or "inf") for limit in limits.split(":"))
        return LambdaFilter(lambda document: low <= MEASURES[name](document.text) <= high)

    with Stopwatch() as watch:
        found = JsonlReader(str(folder), glob_pattern="corpus.jsonl").run(None, 0, 1)
        for each in map(step, specs):
            found = each.run(found, 0, 1)
        kept = [document.id for document in found]
    return watch.result | {"kept": kept}


CONTENDERS = {
    f"{name}, {who}": partial(run, specs=specs)
    for name, specs in SETS.items()
    for who, run in ((OURS, run_ours), (THEIRS, run_datatrove))
}


def main() -> None:
    megabytes = megabytes_or_run(BENCH, __doc__, 4, prepare, CONTENDERS)
    if megabytes is None:
        return
    with tempfile.TemporaryDirectory() as temporary:
        made = run_alone(BENCH, Path(temporary), "prepare", megabytes)
        print(f"{made['bytes'] / 1e6:.1f} MB, {made['documents']:,} documents; MB of text per CPU second")
        for name in SETS:
            ours, theirs = (run_alone(BENCH, Path(temporary), f"{name}, {who}") for who in (OURS, THEIRS))
            speeds = [made["bytes"] / 1e6 / each["cpu"] for each in (ours, theirs)]
            same = "the same" if ours["kept"] == theirs["kept"] else f"{OURS} {len(ours['kept']):,}, others,"
            print(
                f"  {name:<20} {OURS} {speeds[0]:8.2f}   {THEIRS} {speeds[1]:8.2f}   ratio {speeds[0] / speeds[1]:.2f}; "
                f"{same} {len(theirs['kept']):,} kept",
                flush=True,
            )


if __name__ == "__main__":
    main()
