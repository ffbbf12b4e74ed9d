"""A training that is hit at a random moment and continued must end as one that was left alone: the same to the bit.

    python -m bench.faults [--moments 50] [--seed 0] [--kind KIND]

Each moment is a training of its own, on two ranks, with saves in the background every other step. At a random step, and a
random time within it, one of these happens: a rank is killed (SIGKILL); the launcher is; a rank, or both, are while a
checkpoint is copied to memory, or, apart from these, while it is written behind the training; the disk is full for a while,
at any moment, or from within such a write (a small tmpfs, where root may mount one); one of two hosts is cut off or killed
(where root may make network namespaces). Then the same command is given until it ends with 0, without a lost host on one rank.
Compared with the training that nothing happened to: weights and moments of the last checkpoint, byte by byte, the counts of
samples and tokens, the loss of every step, and every sample with its documents by the ledger; on fewer ranks, weights and losses
to 1e-5. No process may be left over on any host. A moment that comes after the end of its training is drawn anew.
"""

import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from bench.corpus import pack
from bench.fault_hosts import HOST_FAULTS, hit_host, hosts
from bench.fault_runs import LONGEST_SECONDS, ROW_TOKENS, STEPS, Comparable, MarkedLaunch, last_step, result
from console.command import CommandParser
from engine.checkpoint.manifest import folder_name

LAUNCHES = 6
ROOM = 40 << 20
TOO_LATE = "it had ended before"
DRAWS = 8
"""Until a moment is in time."""
COPY, WRITE = "in the copy", "in the write"


def kill_rank(launch: MarkedLaunch, chance: random.Random) -> str:
    chance.choice(launch.ranks()).kill()
    return f"at step {last_step(launch.run)}"


def kill_launcher(launch: MarkedLaunch, _: random.Random) -> str:
    launch.kill()
    return f"at step {last_step(launch.run)}"


def kill_in_a_copy(launch: MarkedLaunch, chance: random.Random) -> str:
    """Of the state to memory: the hidden folder is there, and nothing in it."""
    return _kill_in_a_save(launch, chance, lambda files: files == 0, 0)


def kill_in_the_write(launch: MarkedLaunch, chance: random.Random) -> str:
    """Behind the training: files of the checkpoint are there, and it is not complete."""
    return _kill_in_a_save(launch, chance, lambda files: files > 0, chance.uniform(0, 0.01))


def _kill_in_a_save(launch: MarkedLaunch, chance: random.Random, is_moment: Callable[[int], bool], delay: float) -> str:
    """`is_moment`: by the number of files that the folder holds."""
    ranks = launch.ranks()
    victims = chance.choice([ranks, *([rank] for rank in ranks)])
    if not launch.wait_for(lambda: any(is_moment(files) for _, files in _saves(launch)), pause=0):
        return TOO_LATE
    time.sleep(delay)
    found = _saves(launch)
    for rank in victims:
        rank.kill()
    if not found:
        return TOO_LATE
    (step, files), who = found[0], "both ranks" if len(victims) == 2 else "one rank"
    return f"{who} {f'{WRITE} with {files} files' if files else COPY} of step {step}"


def _saves(launch: MarkedLaunch) -> list[tuple[int, int]]:
    """That are under way: of which step, and how many files there are of each."""
    with contextlib.suppress(OSError):  # it is renamed just now
        folders = [path for path in (launch.run / "checkpoints").iterdir() if path.suffix == ".partial"]
        return [(int(path.stem.split("-")[1]), len(list(path.iterdir()))) for path in folders]
    return []


def fill_disk(launch: MarkedLaunch, chance: random.Random) -> str:
    with _full_disk(launch):
        words = f"at step {last_step(launch.run)}"
        return f"{words} {_stay_full(launch, chance)}"


def fill_disk_in_the_write(launch: MarkedLaunch, chance: random.Random) -> str:
    """Behind the training: there was room when it began."""
    if not launch.wait_for(lambda: any(files for _, files in _saves(launch)), pause=0):
        return TOO_LATE
    with _full_disk(launch):
        if not (found := _saves(launch)):
            return TOO_LATE
        step, files = found[0]
        failed, whole = f"step {step} could not be written", launch.run / "checkpoints" / folder_name(step)
        launch.wait_for(lambda: failed in launch.said() or whole.exists())
        words = _stay_full(launch, chance)
        return f"{WRITE} with {files} files of step {step}, {words}" if failed in launch.said() else TOO_LATE


@contextlib.contextmanager
def _full_disk(launch: MarkedLaunch) -> Iterator[None]:
    filler = launch.run.parent / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as file:
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
                    file.flush()
    yield
    filler.unlink()


def _stay_full(launch: MarkedLaunch, chance: random.Random) -> str:
    seconds = chance.choice([0.2, 1.0, LONGEST_SECONDS])
    with contextlib.suppress(subprocess.TimeoutExpired):
        launch.process.wait(seconds)
    return "for good" if seconds == LONGEST_SECONDS else f"for {seconds:g} s"


FAULTS: dict[str, Callable[[MarkedLaunch, random.Random], str]] = {
    "rank killed": kill_rank,
    "launcher killed": kill_launcher,
    "killed in a save's copy": kill_in_a_copy,
    "killed in the write": kill_in_the_write,
    "disk full": fill_disk,
    "disk full in the write": fill_disk_in_the_write,
}


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """Where a run finds little room; None, and a sentence, where none can be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        print("a full disk is left out: no tmpfs can be mounted here")
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def hit(folder: Path, place: Path, fault: str, chance: random.Random, whole: Comparable) -> tuple[bool, str] | None:
    """One moment: whether all was as it has to be, and its line; None: it came too late."""
    run = place / "run"
    shutil.rmtree(run, ignore_errors=True)
    launch, step, delay = MarkedLaunch(folder, run), chance.randrange(1, STEPS), chance.uniform(0, 0.3)
    words = TOO_LATE
    if launch.wait_for(lambda: last_step(run) >= step):
        time.sleep(delay if " in " not in fault else 0.0)
        with contextlib.suppress(psutil.Error, IndexError):  # it ends just now
            words = FAULTS[fault](launch, chance)
    (code, left), launches = launch.end(), 1
    if words == TOO_LATE:
        return None
    while code != 0 and launches < LAUNCHES:
        again, launches = MarkedLaunch(folder, run), launches + 1
        code, more = again.end()
        left += more
    try:
        found = result(run)
        wrong = [name for name in found._fields if getattr(found, name) != getattr(whole, name)]
    except ValueError as error:
        wrong = [str(error)]
    good = code == 0 and not wrong and not left
    verdict = "the same" if good else f"DIFFERS: code {code}, {', '.join(wrong)}"
    return good, f"{words:40s}{launches:9d}{left:10d}   {verdict}"


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=50, help="how many trainings are hit (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of kinds and times (default: %(default)s)")
    parser.add_argument("--kind", choices=[*FAULTS, *HOST_FAULTS], help="only this one (default: all in turn)")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    os.environ["OMP_NUM_THREADS"] = "1"
    good, hits = Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as name, small_disk(Path(name) / "small") as small, hosts() as cluster:
        folder = Path(name)
        pack(folder, ROW_TOKENS)
        code, _ = MarkedLaunch(folder, folder / "whole").end()
        assert code == 0, (folder / "output.txt").read_text()[-4000:]
        whole = result(folder / "whole")
        kinds = [kind for kind in FAULTS if small or "disk" not in kind] + (list(HOST_FAULTS) if cluster else [])
        kinds = [arguments.kind] if arguments.kind else kinds
        print(f"{'what happened':24s}{'seconds':>8s}  {'when':40s}{'launches':>9s}{'left over':>10s}   the end")
        for number in range(arguments.moments):
            kind, began, found = kinds[(number + arguments.seed) % len(kinds)], time.monotonic(), None
            for _ in range(DRAWS):
                if cluster and kind in HOST_FAULTS:
                    found = hit_host(cluster, folder, kind, chance)
                else:
                    found = hit(folder, small if small and "disk" in kind else folder, kind, chance, whole)
                if found:
                    break
            was_good, line = found or (False, f"never in time in {DRAWS} trainings")
            if kind == "killed in a save's copy" and WRITE in line:  # which it had become meanwhile
                kind = "killed in the write"
            hits[kind] += 1
            good[kind] += was_good
            print(f"{kind:24s}{time.monotonic() - began:8.0f}  {line}", flush=True)
    print(*(f"{kind}: {good[kind]} of {hits[kind]}" for kind in hits), sep="; ")
    print(f"{good.total()} of {arguments.moments} ended as the training that was left alone")
    sys.exit(good.total() < arguments.moments)


if __name__ == "__main__":
    main()
