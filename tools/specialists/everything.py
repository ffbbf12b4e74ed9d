"""From the names of tasks to their tables, over texts, data and a base that all of them share."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from console.progress import say
from tools.specialists import answers, domains, search
from tools.specialists.questions import QUESTIONS
from tools.specialists.results import Results
from tools.specialists.texts import DOMAINS, write_domain
from tools.specialists.trainings import Workshop

VALIDATION = ("--validation-fraction", 0.05)


def run_tasks(names: Sequence[str], workshop: Workshop) -> dict[str, Results]:
    """Every task's table, shown and written as soon as it is there."""
    texts = domain_texts(workshop)
    workshop.tokenizer(texts)
    data = workshop.data("domains", texts, *VALIDATION)
    base = workshop.base(data)
    results = workshop.work / "results"
    results.mkdir(exist_ok=True)
    found: dict[str, Results] = {}
    if "domains" in names:
        keep(results, found, {"domains": domains.compare(workshop, base, data, [path.stem for path in texts])})
    if "search" in names:
        keep(results, found, {"search": search.compare(workshop, base, data, [path.stem for path in texts])})
    if asked := [name for name in QUESTIONS if name in names]:
        keep(results, found, answers.compare(workshop, base, asked))
    return found


def keep(folder: Path, found: dict[str, Results], tables: Mapping[str, Results]) -> None:
    for name, table in tables.items():
        found[name] = table
        table.show()
        table.write(folder / name)
        say(f"{folder / name}.md and .json")


def domain_texts(workshop: Workshop) -> list[Path]:
    """A file of documents for each domain."""
    folder = workshop.work / "texts"
    folder.mkdir(exist_ok=True)
    files = [folder / f"{name}.jsonl" for name in DOMAINS]
    for file, pages in zip(files, DOMAINS.values(), strict=True):
        if not file.exists():
            write_domain(pages(workshop.work), file, workshop.settings.texts_bytes)
    return files
