"""Commands understand their arguments before torch is imported, and say in one line what they did not understand."""

import subprocess
import sys

import pytest

from tests.processes import ROOT, clean_environment

COMMANDS = ["train.py"] + [
    f"{package}.{file.stem}"
    for package in ("bench", "data_prep", "tools")
    for file in sorted((ROOT / package).glob("*.py"))
    if '__name__ == "__main__"' in file.read_text(encoding="utf-8") and file.stem != "host_facts"  # takes no flags
]
ASK = """
import runpy, sys
_, name, *words = sys.argv
run = runpy.run_path if name == "train.py" else runpy.run_module
for line in " ".join(words).split(" | "):
    sys.argv = [name, *line.split()]
    try:
        run(name, run_name="__main__")
    except SystemExit as end:
        print(end.code, "torch" in sys.modules)
"""


def ask(*words: str, **env: str) -> subprocess.CompletedProcess:
    """Runs a command with some words, and after a `|` once more in the same process."""
    command = [sys.executable, "-c", ASK, *words]
    return subprocess.run(command, cwd=ROOT, env=clean_environment(env), capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", COMMANDS)
def test_arguments_come_before_torch(name):
    of_one = ["train"] * (name == "data_prep.tokenizer")  # which has commands of its own
    done = ask(name, "--help", "|", *of_one, "--hlep")
    assert [line for line in done.stdout.splitlines() if line in ("0 False", "2 False")] == ["0 False", "2 False"]
    assert "(default: None)" not in done.stdout
    assert done.stderr == "error: unknown flag --hlep; did you mean --help?\n"


def test_train_help_fits_two_screens():
    lines = ask("train.py", "--help", COLUMNS="100").stdout.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 120


def test_a_flag_that_is_not_known_has_the_nearest_name():
    flags = [
        "--optimizer.learning_rate",
        "1",
        "--per_device_train_batch_size",
        "2",
        "--training.lr",
        "1",
        "--logging.every_steps",
        "2",
        "--deepspeed",
        "ds.json",
        "--recip",
        "r",
    ]
    done = ask("train.py", *flags)
    assert done.stderr.splitlines() == [
        "error: unknown flag --optimizer.learning_rate: did you mean --optimizer.lr?",
        "error: unknown flag --per_device_train_batch_size: did you mean --training.micro_batch_samples?",
        "error: unknown flag --training.lr: did you mean --optimizer.lr?",
        "error: unknown flag --logging.every_steps; did you mean --logging.log_every_steps?",
        "error: unknown flag --deepspeed: leave it out, and name the JSON with --deepspeed_config FILE",
        "error: unknown flag --recip; did you mean --recipe?",
    ]
    assert done.stdout.splitlines() == ["2 False"]


def test_a_url_is_not_taken_for_a_path():
    """The folder `s3:` is not what anybody means; where files elsewhere can be had is said in place of it."""
    for command, *flags in [
        ("train.py", "--recipe", "r", "--deepspeed_config", "d", "--data", "s3://bucket/data", "--output", "run"),
        ("train.py", "--recipe", "r", "--deepspeed_config", "d", "--data", "d", "--output=gs://bucket/data"),
        ("tools.export", "hf://bucket/data", "--output", "hf"),
        ("data_prep.verify", "file:///data"),
    ]:
        done = ask(command, *flags)
        assert " is a URL, where a path on this machine is needed: `python -m tools.pull " in done.stderr
        assert done.stderr.startswith("error: argument ")
        assert done.stdout.splitlines() == ["2 False"]
    assert not any((ROOT / f"{protocol}:").exists() for protocol in ("s3", "gs", "hf", "file"))


def test_train_finds_its_modules_with_safe_path():
    command = [sys.executable, str(ROOT / "train.py"), "--help"]
    env = clean_environment({"PYTHONSAFEPATH": "1", "PYTHONPATH": None})
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
