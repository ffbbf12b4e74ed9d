"""Where the time of a run went, in the report: a bar of all its launches, and what each of them did and why it began."""

import html
from datetime import UTC, datetime, timedelta

from tools.panels import COLORS
from training.goodput import KINDS, LaunchTimes, RunTimes, share_of

COLOR_OF = dict(zip(KINDS, ("#10b981", "#ef4444", *COLORS[1:2], *COLORS[4:7], "#b91c1c", "#9ca3af"), strict=True))
ENDED = {None: "was killed or failed", 0: "had finished", 75: "was asked to stop", 130: "was interrupted"}


def bar(times: RunTimes | None) -> str:
    """Markup, empty where there are no times: a stretch for each kind, and below it its share and time."""
    if times is None:
        return ""
    seconds = times.seconds
    stretches, names = "", ""
    for kind, description in KINDS.items():
        if kind != "productive" and not seconds[kind]:
            continue
        words = f"{share_of(seconds, kind):.1%}, {duration(seconds[kind])}"
        color = f"background:{COLOR_OF[kind]}"
        title = html.escape(f"{label(kind)} {words}: {description}")
        stretches += f'<span style="flex:{seconds[kind]:.3f};{color}" title="{title}"></span>'
        names += f'<span title="{title}"><i style="{color}"></i>{label(kind)} {words}</span>'
    return f"<div class=kinds>{stretches}</div><div class=names>{names}</div>"


def launch_rows(times: RunTimes | None) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table."""
    launches = times.launches if times else []
    shown = [kind for kind in KINDS if any(launch.seconds.get(kind) for launch in launches)]
    head = ["launch", "began", "steps", "again", "time", *(label(kind) for kind in shown), "why"]
    rows = []
    for number, launch in enumerate(launches, 1):
        began = datetime.fromtimestamp(launch.began, UTC).strftime("%Y-%m-%d %H:%M:%S")
        steps = f"{launch.after_step + 1:,}–{launch.step:,}" if launch.step > launch.after_step else "none"
        cells = [str(number), began, steps, f"{launch.recomputed_steps:,}", duration(sum(launch.seconds.values()))]
        cells += [duration(launch.seconds.get(kind, 0.0)) for kind in shown]
        rows.append([*cells, _why(launch, launches[number - 2] if number > 1 else None)])
    return head, rows


def label(kind: str) -> str:
    return kind.replace("_", " ")


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else str(timedelta(seconds=round(seconds)))


def _why(launch: LaunchTimes, before: LaunchTimes | None) -> str:
    if launch.reason or before is None:
        return launch.reason or "first"
    return f"the one before {ENDED.get(before.exit_code, f'ended with code {before.exit_code}')}"
