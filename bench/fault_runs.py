"""The training that `bench.faults` hits, how it is started, and what is compared of it."""

import contextlib
import math
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from training.records import read_records

ROOT = Path(__file__).resolve().parent.parent
STEPS = 16
OVERRIDES = {
    "model.hidden_size": "64",
    "model.intermediate_size": "128",
    "model.num_hidden_layers": "2",
    "training.global_batch_tokens": "2048",
    "training.max_steps": str(STEPS),
    "optimizer.lr": "5.0e-4",  # at the recipe's own, rounding errors grow
    "schedule.warmup_steps": "2",
    "schedule.decay_steps": "4",
    "validation.every_steps": "null",
    "checkpoint.every_steps": "2",
    "checkpoint.keep_last": "2",
    "logging.log_every_steps": "1",
    "logging.wandb": "false",
}
FLAGS = ["--recipe", str(ROOT / "recipes/tiny.yaml"), "--deepspeed_config", str(ROOT / "ds_configs/zero2_fp32.json")]
FLAGS += [word for key, value in OVERRIDES.items() for word in (f"--{key}", value)]
ROW_TOKENS = 128
MARK = "LONGFORM_FAULTS"
"""A variable by which the processes of a launch are found."""
LONGEST_SECONDS = 300
END_SECONDS = 60


class Comparable(NamedTuple):
    """Of a training that ended: what must not depend on what happened to it."""

    files: dict[str, Any]
    """Size and digest of each with weights and moments."""
    counts: dict[str, Any]
    losses: dict[int, float]
    samples: list[Any]
    """Every sample of every step, with its documents, by the ledger."""


def result(run: Path) -> Comparable:
    """Raises ValueError where it did not end."""
    from engine.checkpoint.manifest import folder_of, read_manifest
    from tools.run_ledger import open_ledger

    manifest = read_manifest(folder_of(run, STEPS))
    files = {name: entry for name, entry in manifest.files.items() if "optim_states" in name}
    ledger = open_ledger(run)
    samples = [use for step in range(1, STEPS + 1) for use in ledger.of_step(step)]
    return Comparable(files, manifest.state.model_dump(exclude={"wandb_id"}), losses(run), samples)


def distance(run: Path, whole: Path) -> float:
    """Of the losses and weights of two trainings, relative and the largest; infinite where they had other samples."""
    from tools.layouts.final_weights import Weights

    ours, theirs = result(run), result(whole)
    if ours.counts != theirs.counts or ours.samples != theirs.samples or ours.losses.keys() != theirs.losses.keys():
        return math.inf
    kept = run.parent / "weights"
    of_losses = (abs(loss - theirs.losses[step]) / theirs.losses[step] for step, loss in ours.losses.items())
    return max(Weights(whole, kept).difference(run), *of_losses)


def losses(run: Path) -> dict[int, float]:
    file = run / "metrics.jsonl"
    return {r["step"]: r["loss"] for r in read_records(file) if "loss" in r} if file.exists() else {}


def last_step(run: Path) -> int:
    return max(losses(run), default=0)


class MarkedLaunch:
    """A training as a user starts it, on two ranks of one host."""

    def __init__(self, folder: Path, run: Path) -> None:
        self._mark, self.run = secrets.token_hex(8), run
        flags = [*FLAGS, "--data", str(folder / "data"), "--output", str(run)]
        command = ["env", f"{MARK}={self._mark}", sys.executable, "-m", "torch.distributed.run"]
        command += ["--standalone", "--nproc-per-node=2", str(ROOT / "train.py")]
        self._output = folder / "output.txt"
        with self._output.open("ab") as output:
            self._before = output.tell()
            self.process = subprocess.Popen([*command, *flags], stdout=output, stderr=output)

    def said(self) -> str:
        """All that its processes have written to the terminal."""
        with self._output.open("rb") as output:
            output.seek(self._before)
            return output.read().decode(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """All that there are of it."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                facts = process.as_dict(["environ", "status"])
                if (facts["environ"] or {}).get(MARK) == self._mark and facts["status"] != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        return [p for p in self.processes() if p.pid != self.process.pid and p.ppid() == self.process.pid]

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)

    def wait_for(self, condition: Callable[[], Any], pause: float = 0.002) -> bool:
        """Whether it came true while the training ran."""
        deadline = time.monotonic() + LONGEST_SECONDS
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(pause)
        return True

    def end(self) -> tuple[int, int]:
        """Its exit code, and how many processes had to be killed after it."""
        code = self.process.wait(LONGEST_SECONDS)
        deadline = time.monotonic() + END_SECONDS
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in left:
            process.kill()
        return code, len(left)
