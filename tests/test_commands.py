"""Commands understand their arguments before torch is imported, and say in one line what they did not understand."""

import subprocess
import sys

import pytest

from tests.launch import ROOT, clean_environment

WITHOUT_TORCH = ["tools.dashboard", "tools.demo", "tools.report"]
WITHOUT_TORCH += [
    f"data_prep.{file.stem}"
    for file in sorted((ROOT / "data_prep").glob("*.py"))
    if '__name__ == "__main__"' in file.read_text(encoding="utf-8")
]
ASK = """
import atexit, runpy, sys
atexit.register(lambda: print("torch" in sys.modules))
sys.argv = sys.argv[1:]
run = runpy.run_path if sys.argv[0] == "train.py" else runpy.run_module
run(sys.argv[0], run_name="__main__")
"""


def ask(*words: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", ASK, *words]
    return subprocess.run(command, cwd=ROOT, env=clean_environment(env), capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", ["train.py", *WITHOUT_TORCH])
def test_arguments_come_before_torch(name):
    done = ask(name, "--help")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "False"), done.stderr
    assert "(default: None)" not in done.stdout


def test_train_help_fits_two_screens():
    lines = ask("train.py", "--help", COLUMNS="100").stdout.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 120


def test_a_flag_that_is_not_known_has_the_nearest_name():
    flags = ["--optimizer.learning_rate", "1", "--logging.every_steps", "2", "--deepspeed", "ds.json", "--recip", "r"]
    done = ask("train.py", *flags)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: unknown flag --optimizer.learning_rate: did you mean --optimizer.lr?",
        "error: unknown flag --logging.every_steps; did you mean --logging.log_every_steps?",
        "error: unknown flag --deepspeed: leave it out, and name the JSON with --deepspeed_config FILE",
        "error: unknown flag --recip; did you mean --recipe?",
    ]
    assert done.stdout.splitlines() == ["False"]


def test_train_finds_its_modules_with_safe_path():
    command = [sys.executable, str(ROOT / "train.py"), "--help"]
    env = clean_environment({"PYTHONSAFEPATH": "1", "PYTHONPATH": None})
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
