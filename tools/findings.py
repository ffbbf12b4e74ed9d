"""What `tools.doctor` has found so far."""

from typing import Any


class Findings:
    """What was found, printed at once as it comes; problems make the launch fail, notes may surprise."""

    def __init__(self, silent: bool = False) -> None:
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.facts: dict[str, Any] = {}
        """For programs."""
        self._silent = silent

    def problem(self, sentence: str) -> None:
        self.problems.append(sentence)
        self._print(f"problem: {sentence}")

    def note(self, sentence: str) -> None:
        self.notes.append(sentence)
        self._print(f"note: {sentence}")

    def line(self, name: str, text: str) -> None:
        """A fact for people."""
        self._print(f"{name:<14} {text}")

    def _print(self, line: str) -> None:
        if not self._silent:
            print(line, flush=True)
