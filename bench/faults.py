"""A training that is hit at a random moment and continued must end as one that was left alone: the same to the bit.

    python -m bench.faults [--moments 50] [--seed 0]

Each moment is a training of its own, on two ranks under torchrun, with saves in the background every other step. At a random
step, and a random time within it, one of these happens: a rank is killed (SIGKILL), the launcher is, a rank is while a
checkpoint is being written, or the disk is full for a while (a small tmpfs, where root may mount one). Then the same command
is given until it ends with 0. Compared with the training that nothing happened to: weights and moments of the last
checkpoint, byte by byte, the counts of samples and tokens, and the loss of every step; and no process may be left over.
"""

import contextlib
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from bench.corpus import pack
from console.command import CommandParser
from training.records import read_records

STEPS = 16
OVERRIDES = {
    "model.hidden_size": "64",
    "model.intermediate_size": "128",
    "model.num_hidden_layers": "2",
    "training.global_batch_tokens": "2048",
    "training.max_steps": str(STEPS),
    "schedule.warmup_steps": "2",
    "schedule.decay_steps": "4",
    "validation.every_steps": "null",
    "checkpoint.every_steps": "2",
    "checkpoint.keep_last": "2",
    "logging.log_every_steps": "1",
    "logging.wandb": "false",
}
ROW_TOKENS = 128
MARK = "LONGFORM_FAULTS"
"""A variable by which the processes of a launch are found."""
LONGEST_SECONDS = 300
END_SECONDS = 60
LAUNCHES = 6
ROOM = 40 << 20


class Comparable(NamedTuple):
    """Of a training that ended: what must not depend on what happened to it."""

    files: dict[str, Any]
    counts: dict[str, Any]
    losses: dict[int, float]


class MarkedLaunch:
    """A training as a user starts it."""

    def __init__(self, folder: Path, run: Path) -> None:
        self._mark, self.run = secrets.token_hex(8), run
        flags = ["--recipe", "recipes/tiny.yaml", "--deepspeed_config", "ds_configs/zero2_fp32.json"]
        flags += ["--data", str(folder / "data"), "--output", str(run)]
        flags += [word for key, value in OVERRIDES.items() for word in (f"--{key}", value)]
        command = ["env", f"{MARK}={self._mark}", sys.executable, "-m", "torch.distributed.run"]
        command += ["--standalone", "--nproc-per-node=2", "train.py"]
        with (folder / "output.txt").open("ab") as output:
            self.process = subprocess.Popen([*command, *flags], stdout=output, stderr=output)

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

    def wait_for(self, condition: Callable[[], Any]) -> bool:
        """Whether it came true while the training ran."""
        deadline = time.monotonic() + LONGEST_SECONDS
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(0.002)
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


def last_step(run: Path) -> int:
    file = run / "metrics.jsonl"
    return max((r["step"] for r in read_records(file) if "loss" in r), default=0) if file.exists() else 0


def result(run: Path) -> Comparable:
    from engine.checkpoint.manifest import folder_of, read_manifest

    manifest = read_manifest(folder_of(run, STEPS))
    files = {name: entry for name, entry in manifest.files.items() if "optim_states" in name}
    losses = {r["step"]: r["loss"] for r in read_records(run / "metrics.jsonl") if "loss" in r}
    return Comparable(files, manifest.state.model_dump(exclude={"wandb_id"}), losses)


def kill_rank(launch: MarkedLaunch, chance: random.Random) -> str:
    rank = chance.choice(launch.ranks())
    rank.kill()
    return f"at step {last_step(launch.run)}"


def kill_launcher(launch: MarkedLaunch, _: random.Random) -> str:
    launch.process.send_signal(signal.SIGKILL)
    return f"at step {last_step(launch.run)}"


def kill_in_a_save(launch: MarkedLaunch, chance: random.Random) -> str:
    ranks = launch.ranks()
    launch.wait_for(lambda: list((launch.run / "checkpoints").glob(".*.partial")))
    time.sleep(chance.uniform(0, 0.01))
    written = [path.name for path in (launch.run / "checkpoints").glob(".*.partial/*")]
    chance.choice(ranks).kill()
    return f"with {len(written)} files of a checkpoint there"


def fill_disk(launch: MarkedLaunch, chance: random.Random) -> str:
    filler, seconds = launch.run.parent / "filler", chance.choice([0.2, 1.0, LONGEST_SECONDS])
    with contextlib.suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(bytes(1 << 16))
            file.flush()
    with contextlib.suppress(subprocess.TimeoutExpired):
        launch.process.wait(seconds)
    filler.unlink()
    return "for good" if seconds == LONGEST_SECONDS else f"for {seconds:g} s"


FAULTS: dict[str, Callable[[MarkedLaunch, random.Random], str]] = {
    "rank killed": kill_rank,
    "launcher killed": kill_launcher,
    "rank killed in a save": kill_in_a_save,
    "disk full": fill_disk,
}


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """Where a run finds little room; None where none can be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def hit(folder: Path, place: Path, fault: str, chance: random.Random, whole: Comparable) -> bool:
    """One moment; prints its line, and returns whether all was as it has to be."""
    run, began = place / "run", time.monotonic()
    shutil.rmtree(run, ignore_errors=True)
    launch, step = MarkedLaunch(folder, run), chance.randrange(STEPS)
    delay = chance.uniform(0, 0.3)
    words = "it had ended before"
    if launch.wait_for(lambda: last_step(run) >= max(step, 1)):
        time.sleep(delay)
        with contextlib.suppress(psutil.Error, IndexError):  # it ends just now
            words = FAULTS[fault](launch, chance)
    (code, left), launches = launch.end(), 1
    while code != 0 and launches < LAUNCHES:
        again, launches = MarkedLaunch(folder, run), launches + 1
        code, more = again.end()
        left += more
    try:
        same = [a == b for a, b in zip(result(run), whole, strict=True)]
    except ValueError:
        same = [False]
    good = code == 0 and all(same) and not left
    verdict = "the same" if good else f"DIFFERS: {code=} {same=}"
    print(f"{fault:24s}{words:40s}{launches:9d}{left:10d}{time.monotonic() - began:8.0f} s   {verdict}", flush=True)
    return good


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=50, help="how many trainings are hit (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of kinds and times (default: %(default)s)")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name, small_disk(Path(name) / "small") as small:
        folder = Path(name)
        pack(folder, ROW_TOKENS)
        code, _ = MarkedLaunch(folder, folder / "whole").end()
        assert code == 0, (folder / "output.txt").read_text()[-4000:]
        whole, good = result(folder / "whole"), 0
        print(f"{'what happened':24s}{'when':40s}{'launches':>9s}{'left over':>10s}{'':10s}   the end")
        for number in range(arguments.moments):
            fault = list(FAULTS)[number % len(FAULTS)]
            if fault == "disk full" and small is None:
                print("disk full: left out, since no tmpfs can be mounted here")
                good += 1
                continue
            place = small if fault == "disk full" and small else folder
            good += hit(folder, place, fault, chance, whole)
    print(f"{good} of {arguments.moments} ended as the training that was left alone")
    sys.exit(good < arguments.moments)


if __name__ == "__main__":
    main()
