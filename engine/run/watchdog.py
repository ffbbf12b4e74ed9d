"""A thread on every rank that notices a step that does not end, says which rank stands apart, and ends the job.

The first whose step is overdue raises an alarm in the ranks' store. The threads of all answer with their phase and their
Python stacks, also where the main thread is stuck in C code, and one of them judges: who does not answer is stopped or
gone. A rank that validates or saves takes its time, and so may those who wait for it.
"""

import contextlib
import json
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Self

from engine.run.stacks import Answer, apart, grouped, stacks_here, write_text
from launch.peers import FAREWELL_SECONDS, RollCall
from launch.signals import EXIT_HUNG, end
from training.goodput import BETWEEN, END, REWIND, SAVE, START, VALIDATION, PhaseClock

WINDOW_STEPS = 50
LEAST_STEPS = 5
"""After so many the usual time of a step is known."""

LOOK_SECONDS = 0.5
RANKS_PER_SECOND = 2000
"""How many may look for an alarm, which the keeper of the store has to answer."""

ANSWER_SECONDS = 3.0
STORE_SECONDS = 3.0
UNWATCHED = (START, VALIDATION, SAVE, REWIND, END)


class Watchdog:
    """Knows what steps usually take; silent until one takes far longer."""

    def __init__(self, run: Path, grace_seconds: float | None, roll_call: RollCall | None, phases: PhaseClock) -> None:
        """A step may take twice its usual time and `grace_seconds`; None: any time. `roll_call`: None for one rank.

        `phases`: which this rank is in.
        """
        self._run, self._grace, self._roll_call, self._phases = run, grace_seconds, roll_call, phases
        self._rank = roll_call.rank if roll_call else 0
        self._pause = max(LOOK_SECONDS, (roll_call.world_size if roll_call else 1) / RANKS_PER_SECOND)
        self._taken: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._step, self._alarms = 0, 0
        self._began = time.monotonic()
        self._closed = threading.Event()
        self._store_thread = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        if self._grace is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def close(self, failed: bool = False) -> None:
        """Stop watching; a rank that has `failed` still answers the others, who may wait for it, until its process ends."""
        self._phases.enter(END)
        if not failed:
            self._closed.set()

    @contextlib.contextmanager
    def aside(self, phase: str) -> Iterator[None]:
        """What is done in here belongs to no step."""
        began = time.monotonic()
        with self._phases.aside(phase):
            yield
            self._began += time.monotonic() - began

    def step_done(self, step: int) -> None:
        now = time.monotonic()
        self._taken.append(now - self._began)
        self._step, self._began = step, now
        self._phases.enter(BETWEEN)

    def forget_usual(self) -> None:
        """Steps are of another kind from now on."""
        self._taken.clear()

    @property
    def _overdue(self) -> float | None:
        """What a step usually takes, where this one has taken too long."""
        taken = list(self._taken)
        if self._phases.phase in UNWATCHED or len(taken) < LEAST_STEPS or self._grace is None:
            return None
        usual = statistics.median(taken)
        return usual if time.monotonic() - self._began > 2 * usual + self._grace else None

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._closed.wait(self._pause):
            now = time.monotonic()
            if (gap := now - looked) > 10 * self._pause:  # this process was stopped, or has waited for a core
                self._began += gap
            looked = now
            usual = self._overdue
            if usual is not None or self._alarm():
                self._settle(usual)
                looked = self._began = time.monotonic()

    def _alarm(self) -> bool:
        """Whether another rank has raised one."""
        with contextlib.suppress(RuntimeError, TimeoutError):
            return self._roll_call is not None and self._ask(lambda store: store.check([self._key("alarm")]))
        return False

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        """A look into the store, which is silent where its keeper is stopped: TimeoutError, or RuntimeError where it is gone."""
        assert self._roll_call
        return self._store_thread.submit(question, self._roll_call.store).result(STORE_SECONDS)

    def _key(self, name: str | int) -> str:
        return f"longform/alarm/{self._alarms}/{name}"

    def _settle(self, usual: float | None) -> None:
        """Answer an alarm, or raise one where this rank has waited too long beside `usual` seconds. Returns if it is none."""
        step, mine = self._step + 1, self._answer()
        roll_call, sentence = self._roll_call, ""
        if roll_call is None:
            sentence = self._judge(step, usual or 0.0, [mine], [])
        else:
            roll_call.exit_code = EXIT_HUNG  # whoever notices in a collective that others end now
            try:
                sentence = self._agree(roll_call, step, usual, mine)
            except (RuntimeError, TimeoutError):
                if usual is not None:
                    keeper = f"{roll_call.named([0])} does not answer: {roll_call.state_here(0) or 'stopped or gone'}"
                    sentence = self._write(step, usual, keeper, [mine], f"-rank-{self._rank}")
        if sentence:
            if self._rank == 0:
                time.sleep(FAREWELL_SECONDS)  # for the others, who read the same store
            end(EXIT_HUNG, f"error: {sentence}")
        elif roll_call:
            roll_call.exit_code = 1

    def _agree(self, roll_call: RollCall, step: int, usual: float | None, mine: Answer) -> str:
        """The judge's sentence, which is empty where somebody saves or goes on. Raises RuntimeError, TimeoutError."""
        key = {name: self._key(name) for name in ("alarm", "judge", "verdict")}
        self._ask(lambda store: store.set(self._key(self._rank), json.dumps(mine)))
        self._ask(lambda store: store.set(key["alarm"], ""))
        deadline = time.monotonic() + 3 * (ANSWER_SECONDS + self._pause)
        if usual is None or self._ask(lambda store: store.add(key["judge"], 1)) > 1:
            while time.monotonic() < deadline and not self._ask(lambda store: store.check([key["verdict"]])):
                time.sleep(0.1)
        verdict = self._ask(partial(_get_if_there, key=key["verdict"]))
        if verdict is None:  # this rank judges, as the first to be overdue or since the judge itself is silent
            answers, silent = self._collect(roll_call)
            goes_on = usual is None or self._overdue is None or any(answer.phase in UNWATCHED for answer in answers)
            verdict = b"" if goes_on else self._judge(step, usual or 0.0, answers, silent).encode()
            self._ask(lambda store: store.set(key["verdict"], verdict))
        self._alarms += 1
        return verdict.decode()

    def _collect(self, roll_call: RollCall) -> tuple[list[Answer], list[int]]:
        """The answers of all ranks, and those who gave none."""
        silent, deadline = set(range(roll_call.world_size)), time.monotonic() + ANSWER_SECONDS + self._pause
        answers: list[Answer] = []
        while silent and time.monotonic() < deadline:
            for rank in sorted(silent):
                if text := self._ask(partial(_get_if_there, key=self._key(rank))):
                    answers.append(Answer(*json.loads(text)))
                    silent.remove(rank)
            time.sleep(0.1)
        return sorted(answers), sorted(silent)

    def _judge(self, step: int, usual: float, answers: list[Answer], silent: list[int]) -> str:
        if silent:
            assert self._roll_call
            states = {state for rank in silent if (state := self._roll_call.state_here(rank))}
            why = " and ".join(states) or "killed, stopped, or its host cannot be reached"
            return self._write(step, usual, f"{self._named(silent)} does not answer: {why}", answers)
        odd = apart(answers)
        who = f"{self._named([each.rank for each in odd])} stands apart" if odd else "no rank stands apart"
        first = (odd or answers)[0]
        return self._write(step, usual, f"{who}, in the phase {first.phase!r} for {first.seconds:.0f} s", answers)

    def _write(self, step: int, usual: float, finding: str, answers: list[Answer], suffix: str = "") -> str:
        """The sentence of a hang, which the written text begins with."""
        took = time.monotonic() - self._began
        file = self._run / "stacks" / f"step-{step:08d}{suffix}.txt"
        sentence = (
            f"step {step} hangs, after {took:.0f} s where {usual:.2g} s are usual: {finding}; Python stacks of "
            f"the ranks: {file}; the same command continues from the newest checkpoint"
        )
        parts = [sentence]
        for members in grouped(answers):
            first, phases = members[0], f"{members[0].phase}, for {max(each.seconds for each in members):.0f} s"
            parts.append(f"{self._named([each.rank for each in members])}: {phases}")
            parts += [f"thread {name}\n{stack}" for name, stack in first.threads.items()]
        writer = threading.Thread(target=write_text, args=(file, "\n\n".join(parts)), daemon=True)
        writer.start()
        writer.join(STORE_SECONDS)  # where the file system is what hangs, the job ends without it
        return sentence

    def _named(self, ranks: list[int]) -> str:
        return self._roll_call.named(ranks) if self._roll_call else f"{socket.gethostname()} (rank 0)"

    def _answer(self) -> Answer:
        return Answer(self._rank, self._phases.phase, round(self._phases.phase_seconds, 1), stacks_here())


def _get_if_there(store: Any, key: str) -> bytes | None:
    return store.get(key) if store.check([key]) else None
