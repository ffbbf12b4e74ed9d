"""Tables of figures, each a mean over seeds and the distance of the seeds: for the console, as JSON, and in Markdown."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from storage.atomic import write_atomically


class Figure(NamedTuple):
    """The same measured with each seed."""

    of_seeds: Sequence[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.of_seeds)

    @property
    def spread(self) -> float:
        """The largest minus the smallest."""
        return max(self.of_seeds) - min(self.of_seeds)

    def text(self, digits: int) -> str:
        spread = f" ±{self.spread / 2:.{digits}f}" if len(self.of_seeds) > 1 else ""
        return f"{self.mean:.{digits}f}{spread}"


class Results(NamedTuple):
    """What a task ends with."""

    title: str
    columns: Sequence[str]
    rows: Mapping[str, Mapping[str, Figure]]
    """By name of the row, the figures by column; where one is missing there is nothing to measure."""
    digits: int
    statements: Sequence[str] = ()
    """What was looked at beside the table, and whether it holds."""

    def show(self) -> None:
        table = Table("", *self.columns, title=self.title, caption="\n".join(self.statements))
        for name, cells in self._cells():
            table.add_row(name, *cells)
        Console().print(table)

    def write(self, output: Path) -> None:
        """`output` with the suffixes .json and .md."""
        rows = {
            name: {
                column: {"mean": figure.mean, "spread": figure.spread, "of_seeds": list(figure.of_seeds)}
                for column, figure in figures.items()
            }
            for name, figures in self.rows.items()
        }
        content: dict[str, Any] = {"title": self.title, "rows": rows, "statements": list(self.statements)}
        write_atomically(output.with_suffix(".json"), json.dumps(content, indent=1, ensure_ascii=False).encode())
        write_atomically(output.with_suffix(".md"), self.markdown().encode())

    def markdown(self) -> str:
        lines = [f"**{self.title}**", "", f"| | {' | '.join(self.columns)} |", "|---" * (1 + len(self.columns)) + "|"]
        lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in self._cells()]
        return "\n".join([*lines, "", *(f"- {statement}" for statement in self.statements)]) + "\n"

    def _cells(self) -> list[tuple[str, list[str]]]:
        return [
            (name, [figures[c].text(self.digits) if c in figures else "" for c in self.columns])
            for name, figures in self.rows.items()
        ]
