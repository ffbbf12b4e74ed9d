"""The figures of `tools.evaluate` as tables. What is shown is what the JSON holds; nothing is computed here."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

PASSKEY_FIGURES = {
    "exact_match": "exact match",
    "forced_choice": "forced choice among {candidates} (chance {chance:.2f})",
    "nll_drop": "drop of the key's cross-entropy (nats)",
}


def score_table(found: dict[str, Any], title: str, kind: str = "loss") -> Table:
    """`kind`: what the figure called `loss` is; of models that predict masked tokens it may be a bound."""
    table = Table("source", kind, "perplexity", "bits/byte", "targets", title=title)
    for source, row in found.items():
        bits = f"{row['bits_per_byte']:.4f}" if "bits_per_byte" in row else ""
        figures = f"{row['loss']:.4f}", f"{row['perplexity']:.2f}", bits
        table.add_row(source, *figures, f"{row['targets']:,}")
    return table


def cost_table(found: Mapping[str, Mapping[str, float]], title: str, caption: str = "") -> Table:
    """Of each row, bits per byte by source, as `tools.evaluation.domains.bits_per_byte` finds them."""
    table = Table("", *next(iter(found.values())), title=title, caption=caption or None)
    for name, row in found.items():
        table.add_row(name, *(f"{value:.4f}" for value in row.values()))
    return table


def position_table(found: dict[str, Any], kind: str = "loss") -> Table:
    """`found` as `tools.evaluation.long_context.positions` makes it."""
    by_bucket = [{row["first"]: row for row in rows} for rows in found.values()]
    whole = whole_set(found)
    caption = "position: tokens of the same piece of a document before the target; ± standard error between pieces"
    table = Table("position", *found, "targets", title=f"{kind} by position (nats)", caption=caption)
    for row in whole:
        cells = [_measured(rows[row["first"]], "loss") if row["first"] in rows else "" for rows in by_bucket]
        table.add_row(bucket_name(row), *cells, f"{row['targets']:,}")
    return table


def gain_tables(found: dict[str, Any]) -> list[Table]:
    """`found` as `tools.evaluation.long_context.context_gain` makes it."""
    whole = whole_set(found)
    caption = "loss where a token sees only its own chunk of the document, minus loss where it sees all before it"
    by_source = Table("chunk", *found, "loss", title="gain from context (nats a target)", caption=caption)
    for number, row in enumerate(whole):
        cells = [_measured(rows[number], "gain") for rows in found.values()]
        by_source.add_row(f"{row['limit']:,}", *cells, f"{row['loss']:.4f}")
    chunks = [f"chunk {row['limit']:,}" for row in whole]
    by_position = Table("position", *chunks, title="gain from context by position (nats a target)")
    for rows in zip(*(row["positions"] for row in whole), strict=True):
        beyond = [row["last"] > limit["limit"] for row, limit in zip(rows, whole, strict=True)]
        if any(beyond):  # the first chunk sees all before it in both cases
            cells = [_measured(row, "gain") if show else "" for row, show in zip(rows, beyond, strict=True)]
            by_position.add_row(bucket_name(rows[0]), *cells)
    return [by_source, by_position]


def passkey_tables(found: dict[str, Any]) -> list[Table]:
    """`found` as `tools.evaluation.passkey.passkey` makes it: a table for each figure, lengths down, depths across."""
    tables = []
    for figure in PASSKEY_FIGURES:
        lengths, depths, values = passkey_grid(found, figure)
        table = Table(
            "length", *(f"at {depth:g}" for depth in depths), title=f"pass key: {passkey_title(found, figure)}"
        )
        for length, row in zip(lengths, values, strict=True):
            table.add_row(f"{length:,}", *(f"{value:.2f}" for value in row))
        tables.append(table)
    tables[-1].caption = f"at: share of the filler before the key; {found['trials']} trials each; {found['language']}"
    return tables


def passkey_title(found: dict[str, Any], figure: str) -> str:
    return PASSKEY_FIGURES[figure].format(candidates=found["candidates"], chance=1 / found["candidates"])


def passkey_grid(found: dict[str, Any], figure: str) -> tuple[list[int], list[float], list[list[float]]]:
    """Lengths, depths, and the figure of each pair, [lengths][depths]."""
    values = {(cell["length"], cell["depth"]): cell[figure] for cell in found["cells"]}
    lengths, depths = (sorted({pair[i] for pair in values}) for i in (0, 1))
    return lengths, depths, [[values[length, depth] for depth in depths] for length in lengths]


def whole_set(found: dict[str, Any]) -> Any:
    """The entry of all sources together, which is the last, or that of the only source."""
    return list(found.values())[-1]


def bucket_name(row: dict[str, Any]) -> str:
    """The positions of a bucket."""
    return f"{row['first']:,}" if row["first"] == row["last"] else f"{row['first']:,} - {row['last']:,}"


def _measured(row: dict[str, Any], key: str) -> str:
    """The figure and its standard error, in one word so that a narrow table does not break it."""
    error = row["standard_error"]
    return f"{row[key]:.4f}" + ("" if error is None else f"±{error:.4f}")
