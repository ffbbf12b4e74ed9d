"""What the pages of this package share: their look, tables and lists of escaped text, and how a page gets to its place."""

import html
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import Any

HERE = Path(__file__).parent


def framed(title: str, status: str, head: list[tuple[str, str]], tiles: list[tuple[str, str]], body: str) -> str:
    """A whole page: its name, how things stand, what it is of, its main figures, and markup that follows them."""
    return Template((HERE / "page.html").read_text(encoding="utf-8")).substitute(
        style=(HERE / "page.css").read_text(encoding="utf-8"),
        title=html.escape(title),
        status=html.escape(status),
        head=definitions(head),
        tiles=definitions(tiles),
        body=body,
    )


def definitions(pairs: list[tuple[str, str]]) -> str:
    """Names and what they are, for a `dl`."""
    return "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd></div>" for name, text in pairs)


def options_of(names: dict[str, str], chosen: str) -> str:
    """The options of a `select`, by the names of their values."""
    return "".join(
        f'<option value="{name}"{" selected" if name == chosen else ""}>{text}</option>' for name, text in names.items()
    )


def table(head: list[str], rows: list[list[str]], shares: list[float] | None = None) -> str:
    """A table of numbers, the first column of names; `shares` [rows] of 1 are drawn as bars behind the last column.

    Empty without rows, which hides its section.
    """
    if not rows:
        return ""
    lines = [_cells("td", row) for row in rows]
    if shares is not None:
        lines = [f"{line}<td class=bar>{_bar(share)}</td>" for line, share in zip(lines, shares, strict=True)]
    headings = _cells("th", [*head, ""] if shares is not None else head)
    return f"<table class=numbers><tr>{'</tr><tr>'.join([headings, *lines])}</tr></table>"


def _bar(share: float) -> str:
    return f'<i style="width:{share:.2%}"></i>'


def _cells(tag: str, texts: list[str]) -> str:
    return "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in texts)


def details(name: str, value: Any) -> str:
    """A closed section that lists all that is in `value`, a JSON value, a line each."""
    rows = "".join(
        f"<tr><th>{html.escape(key)}</th><td>{html.escape(text)}</td></tr>" for key, text in flattened(value, "")
    )
    return f"<details><summary>{html.escape(name)}</summary><table>{rows}</table></details>"


def flattened(value: Any, prefix: str) -> list[tuple[str, str]]:
    """Dotted keys and texts of all that is in a JSON value."""
    if isinstance(value, dict) and value:
        return [row for key, item in value.items() for row in flattened(item, f"{prefix}.{key}" if prefix else key)]
    return [(prefix, value if isinstance(value, str) else json.dumps(value))]


def write_page(command: str, output: Path, page: Callable[[], str]) -> int:
    """Write a page in one rename, so that a browser that reloads it never sees half of it; the exit code of the command."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        text = page()
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(output)
    except (ValueError, OSError) as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{output} ({output.stat().st_size / 2**20:.1f} MiB): open it in a browser")
    return 0
