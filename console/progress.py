"""Progress of a long command: a bar on a terminal, a plain line every few seconds elsewhere (both on stderr)."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
LINE_SECONDS = 5.0


def say(words: str) -> None:
    """Print on standard error, between the bars if there are any."""
    console.print(words)


class Progress:
    """Counts input bytes (the share done) and, if told, tokens. Shows nothing for what takes less than a moment."""

    def __init__(self, task: str, total_bytes: int) -> None:
        self.task, self.total = task, max(1, total_bytes)
        self.bytes = self.tokens = self.skipped = 0
        self.started = self.shown = time.monotonic()
        self.bars: Bars | None = None

    def __enter__(self) -> "Progress":
        if console.is_terminal:
            columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f} %")
            self.bars = Bars(*columns, TextColumn("{task.fields[rate]}"), TimeRemainingColumn(), console=console)
            self.bars.add_task(self.task, total=self.total, rate="")
            self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.bars is not None:
            if kind is None:
                self.bars.update(self.bars.task_ids[0], completed=self.total, rate=self._rate())
            self.bars.stop()

    def resume_at(self, done_bytes: int) -> None:
        """Count what an earlier run did as done, but not into this run's speed."""
        self.skipped = done_bytes
        self.show()

    def advance(self, new_bytes: int, new_tokens: int = 0) -> None:
        """Count what was done since the last call."""
        self.bytes, self.tokens = self.bytes + new_bytes, self.tokens + new_tokens
        self.show()

    def show(self) -> None:
        """Draw the bar, or print a line if the last one is `LINE_SECONDS` old."""
        done = min(self.total, self.skipped + self.bytes)
        if self.bars is not None:
            self.bars.update(self.bars.task_ids[0], completed=done, rate=self._rate())
        elif time.monotonic() - self.shown >= LINE_SECONDS:
            self.shown = time.monotonic()
            print(f"{self.task}: {100 * done / self.total:.0f} %  {self._rate()}", file=sys.stderr, flush=True)

    def _rate(self) -> str:
        seconds = max(1e-9, time.monotonic() - self.started)
        rate = f"{self.bytes / seconds / 1e6:.1f} MB/s"
        return rate + (f"  {self.tokens / seconds / 1e6:.2f} Mtok/s" if self.tokens else "")
