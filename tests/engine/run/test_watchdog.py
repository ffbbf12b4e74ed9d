"""A step that does not end is noticed, who stands apart is named with its phase, and all ranks end with a code of their own."""

import os
import re
import signal
import time

import pytest

from engine.run import outputs, samples
from engine.run.stacks import Answer, apart
from launch.rank import run_rank
from launch.signals import StopSignal
from tests.engine.programs import prepare
from tests.ranks import RankError, run_ranks

HANGS_AT = 8
GRACE_SECONDS = 4


def run_and_hang(victim: int, how: str, words: list[str]) -> None:
    """train.py on this rank, whose samples of a step do not come where it is the victim."""
    import train

    class Data:
        def __init__(self, batches, rank: int) -> None:
            self.batches, self.rank, self.given = batches, rank, 0

        def __iter__(self):
            return self

        def __next__(self):
            self.given += 1
            if self.given == HANGS_AT and self.rank == victim and how != "save":
                if how == "SIGSTOP":
                    os.kill(os.getpid(), signal.SIGSTOP)
                time.sleep(1000)
            return next(self.batches)

    def slow_retire(self, folder) -> list[str]:
        time.sleep(3 * GRACE_SECONDS)
        return []

    if how == "save":
        outputs.Retention.retire = slow_retire
    real = samples.train_loader
    samples.train_loader = lambda *args, **options: Data(real(*args, **options), options["rank"])
    run_rank(lambda: train.main(train.parse_arguments(words), StopSignal()))


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("watchdog")
    recipe, data = prepare(folder)
    never = ["--validation.every_steps", "null", "--training.hang_seconds", str(GRACE_SECONDS)]
    return ["--recipe", recipe, "--deepspeed_config", "ds_configs/zero2_fp32.json", "--data", data, *never]


@pytest.mark.parametrize(
    ("victim", "how", "sentence"),
    [
        (1, "sleep", "(rank 1) stands apart, in the phase 'waiting for data' for "),
        (1, "SIGSTOP", "(rank 1) does not answer: is stopped (SIGSTOP): its process does not run"),
        (0, "SIGSTOP", "(rank 0) does not answer: is stopped (SIGSTOP): its process does not run"),
    ],
)
def test_the_others_name_who_hangs(victim, how, sentence, words, tmp_path):
    run = tmp_path / "run"
    stopped = how == "SIGSTOP"
    arguments = [*words, "--output", str(run)]
    with pytest.raises(RankError) as raised:
        run_ranks(run_and_hang, 2, victim, how, arguments, timeout=200, until_all_end=not stopped)
    said = str(raised.value)
    assert f"rank {1 - victim}: exit code 76" in said, said
    assert ("exit code 76" in said.replace(f"rank {1 - victim}: exit code 76", "")) is not stopped
    (line,) = set(re.findall(rf"error: step {HANGS_AT} hangs, after .*", said))
    assert sentence in line
    (file,) = (run / "stacks").iterdir()
    assert str(file) in line
    text = file.read_text()
    assert text.startswith(line.removeprefix("error: "))
    assert (", in __next__" in text) is not stopped
    assert "train_step" in text


def test_a_save_that_takes_long_on_one_rank_is_awaited(words, tmp_path):
    arguments = [*words, "--output", str(tmp_path / "run"), "--checkpoint.every_steps", "6"]
    with pytest.raises(RankError) as raised:
        run_ranks(run_and_hang, 2, 0, "save", arguments, timeout=200, until_all_end=True)
    said = str(raised.value)
    assert "exit code" not in said, said
    assert "step 8/8 | checkpoint" in said
    assert not (tmp_path / "run/stacks").exists()


def answer(rank: int, phase: str, stack: str) -> Answer:
    return Answer(rank, phase, 1.0, {"MainThread": stack})


COLLECTIVE = 'File "torch/distributed/distributed_c10d.py", in all_reduce'


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([("update", COLLECTIVE), ("update", COLLECTIVE)], []),
        ([("waiting for data", "get"), ("update", COLLECTIVE), ("update", COLLECTIVE)], [0]),
        ([("update", "tolist"), ("update", "tolist"), ("waiting for data", "get")], [2]),  # as a GPU's ranks wait
        ([("update", "a"), ("update", "b"), ("update", "a")], [1]),
        ([("update", COLLECTIVE), ("update", f"in backward {COLLECTIVE}"), ("update", COLLECTIVE)], [1]),
        ([("update", "a"), ("update", "b"), ("update", "a"), ("update", COLLECTIVE)], [1]),
    ],
)
def test_who_stands_apart(answers, expected):
    assert [found.rank for found in apart([answer(rank, *each) for rank, each in enumerate(answers)])] == expected
