"""Parts of the report that are no curves: what a plan foresaw, steps that stand out and their documents, samples."""

import html
import statistics
from typing import Any

from tools.page import table
from tools.run_history import Run
from tools.shown import PLANNED

NEIGHBOURS, STANDS_OUT, MOST_STEPS, MOST_SAMPLES = 12, 3.0, 8, 6


def planned_rows(run: Run) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table: what was foreseen and what was measured, as far as the run says both or either."""
    found: dict[str, Any] = {}
    for record in [*run.steps, *run.events]:
        found |= {key: value for key, value in record.items() if key.startswith(("planned_", "measured_"))}
    rows = []
    for name, words in PLANNED.items():
        foreseen, measured = (found.get(f"{kind}_{name}") for kind in ("planned", "measured"))
        if foreseen is None and measured is None:
            continue
        off = f"{measured / foreseen - 1:+.1%}" if foreseen and measured else ""
        rows.append([words, *("–" if value is None else f"{value:,.4g}" for value in (foreseen, measured)), off])
    return ["", "planned", "measured", "off by"], rows


def notable_steps(run: Run) -> list[list[str]]:
    """Rows of a table: spikes, with the documents that were named, steps that were not applied, and the logged steps whose
    gradient norm lies farthest above the median of those around them."""
    rows: dict[int, list[str]] = {}
    norms = [(record["step"], record["grad_norm"]) for record in run.steps if record.get("grad_norm") is not None]
    ratios = []
    for place, (step, norm) in enumerate(norms):
        around = [each for _, each in norms[max(0, place - NEIGHBOURS) : place + NEIGHBOURS + 1]]
        ratios.append((norm / max(statistics.median(around), 1e-300), step, norm))
    for ratio, step, norm in sorted(ratios, reverse=True)[:MOST_STEPS]:
        if ratio > STANDS_OUT:
            rows[step] = [f"{step:,}", f"gradient norm {norm:.4g}, {ratio:.1f} times the median around it", ""]
    for event in run.events:
        if event["event"] == "skip":
            rows[event["step"]] = [f"{event['step']:,}", "was not applied", ""]
        if event["event"] == "spike":
            named = ", ".join(map(str, event.get("documents", ())))
            step = event.get("spike_step", event["step"])
            rows[step] = [f"{step:,}", f"spike: {event.get('reason', '')}; {event.get('action', '')}", named]
    return [rows[step] for step in sorted(rows)][-3 * MOST_STEPS :]


def steps_section(run: Run) -> str:
    """A field for the number of a step, filled by a click on a curve, the command that names its documents, and a table."""
    head, rows = ["step", "what stands out", "documents that were named"], notable_steps(run)
    if not any(documents for *_, documents in rows):
        head, rows = head[:-1], [row[:-1] for row in rows]
    named = table(head, rows)
    field = '<label>documents of step <input id="step" type="number" min="1" size="8"></label>'
    return (
        f'<section data-run="{html.escape(run.folder, quote=True)}" id="steps"><nav>{field}'
        f'<code id="ledger">click on a curve, or give a step</code></nav>{named.replace("numbers", "words")}</section>'
    )


def samples(run: Run) -> str:
    """What `tools.generate` wrote with the run's checkpoints, the newest first."""
    texts = []
    for record in reversed(run.samples[-MOST_SAMPLES:]):
        what = f"generated at step {record['step']:,}, temperature {record['temperature']:g}"
        text = f"<b>{html.escape(record['prompt'])}</b>{html.escape(record['text'])}"
        texts.append(f'<p>{html.escape(what)}</p><div class="sample" dir="auto">{text}</div>')
    return "".join(texts)
