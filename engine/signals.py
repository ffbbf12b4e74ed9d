"""SIGTERM and SIGUSR1, as schedulers send them before they take a machine away, become a flag that is read each step."""

import signal


class StopSignal:
    """Remembers the first signal; more of them change nothing, since scheduler and launcher often both send one."""

    def __init__(self):
        self.name: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame) -> None:
        self.name = self.name or signal.Signals(number).name
