"""Predicted against measured memory of the ranks of small runs on CPUs: `python -m bench.plan_memory [NAME ...] [--json FILE]`.

A rank is a process that does what train.py does: plan, engine, steps. Measured is the most that it holds during two steps less
what it held before the engine was built, after a shallower run had loaded all libraries and what they need to work in; pages of
the libraries' files that are read meanwhile do not count. The C library gives every tensor pages of its own there and takes them
back at once, so that the allocator adds next to nothing; of the rank that holds most.
"""

import gc
import json
import multiprocessing
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from console.command import CommandParser, run_command
from storage.atomic import write_atomically

ROOT = Path(__file__).resolve().parent.parent
STEPS, ACCUMULATION, ROWS = 2, 2, 64
LENGTHS = 2048, 1024
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
RECIPE: dict[str, dict[str, Any]] = {
    "model": {
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
    },
    "training": {"global_batch_tokens": 1, "micro_batch_samples": 1, "max_steps": 10},
    "optimizer": {"lr": 1e-4},
    "validation": {"every_steps": None},
    "logging": {"wandb": False},
}
SHALLOW = {"model.num_hidden_layers": "2"}
"""The run before the measured one, as wide: kernels for these shapes, and what libraries keep to work in, are there after it."""
PAIR = {"tensor": 2, "sequence": 2}


class Case(NamedTuple):
    file: str
    ranks: int
    degrees: dict[str, int] = {}  # noqa: RUF012
    recipe: dict[str, Any] = {}  # noqa: RUF012

    @property
    def name(self) -> str:
        changes = [f"{key.rpartition('.')[2]} {value}" for key, value in self.recipe.items()]
        return ", ".join([self.file, f"{self.ranks} rank{'s' * (self.ranks > 1)}", *changes])


RECOMPUTED = {"training.activation_checkpointing": True}
CASES = [
    Case("zero0_fp32", 1),
    Case("zero0_fp32", 2),
    Case("zero0", 2),
    Case("zero1_fp32", 2),
    Case("zero1", 2),
    Case("zero2_fp32", 2),
    Case("zero2", 2),
    Case("zero3_fp32", 2),
    Case("zero3", 2),
    Case("pipeline_fp32", 2, {"pipeline": 2}),
    Case("pipeline", 2, {"pipeline": 2}),
    Case("tensor2_zero0_fp32", 2),
    Case("tensor2_zero1", 2),
    Case("tensor2_zero3", 2),
    Case("sequence2_zero2", 2),
    Case("sequence2_zero3", 2),
    Case("tensor_sequence_zero1", 4, PAIR),
    Case("3d_zero1", 4, {"pipeline": 2, "tensor": 2}),
    Case("zero1_fp32", 2, {}, {"optimizer.name": "lion"}),
    Case("zero0_fp32", 2, {}, RECOMPUTED),
    Case("zero2", 2, {}, {"training.activation_checkpointing": 2}),
    Case("pipeline_fp32", 2, {"pipeline": 2}, RECOMPUTED),
]


def of_plan(folder: Path, case: Case, length: int) -> tuple[str, dict[str, str], str, str]:
    """The first arguments of `engine.run.plan.make_plan`."""
    file = ROOT / f"ds_configs/{case.file}.json"
    config = json.loads(file.read_text())
    fixed = {
        "sequence": config.get("sequence_parallel_size", 1),
        "tensor": config.get("tensor_parallel", {}).get("autotp_size", 1),
        "pipeline": 1,
    }
    groups = case.ranks
    for axis, size in fixed.items():
        groups //= case.degrees.get(axis, size)
    changes = {"training.global_batch_tokens": length * ACCUMULATION * groups} | case.recipe
    overrides = {key: json.dumps(value) for key, value in changes.items()}
    return str(folder / "recipe.yaml"), overrides, str(file), str(folder / str(length))


def run_rank(rank: int, port: int, folder: Path, case: Case, length: int, results: Any) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.ranks, "LOCAL_WORLD_SIZE": case.ranks}
    for name, value in (places | {"LOCAL_SIZE": case.ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}).items():
        os.environ[name] = str(value)
    sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115  # to the end of the process

    from engine.process_group import start_process_group
    from engine.run.begin import begin
    from engine.run.plan import make_plan
    from launch.topology import read_topology

    topology = read_topology()
    recipe, changes, *files = of_plan(folder, case, length)
    plan = make_plan(recipe, changes, files[0], files[1], topology, case.degrees)
    start_process_group(topology)
    small = begin(make_plan(recipe, changes | SHALLOW, files[0], files[1], topology, case.degrees))
    small.step()
    gc.collect()
    before, peaks = status("RssAnon:"), []
    loop = begin(plan)
    for _ in range(STEPS):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
        loop.step()
        peaks.append(status("VmHWM:") - status("RssFile:") - status("RssShmem:"))
    results.put((rank, max(peaks) - before))
    results.close()
    results.join_thread()
    os._exit(0)


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measure(folder: Path, case: Case, length: int) -> dict[int, int]:
    """Bytes by rank."""
    context = multiprocessing.get_context("forkserver")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    results = context.Queue()
    ranks = [
        context.Process(target=run_rank, args=(rank, port, folder, case, length, results)) for rank in range(case.ranks)
    ]
    for process in ranks:
        process.start()
    found = dict(results.get(timeout=600) for _ in ranks)
    for process in ranks:
        process.join()
    return found


def predict(folder: Path, case: Case, length: int) -> list[int]:
    """Bytes by rank."""
    from engine.run.plan import make_plan
    from planner.activations import Trials
    from planner.hardware import find_hardware
    from planner.memory import rank_memory

    hardware, trials = find_hardware(f"thisx{case.ranks}"), Trials()
    plan = make_plan(*of_plan(folder, case, length), hardware.topology(), case.degrees)
    return [rank_memory(plan, rank, "cpu", None, trials).peak for rank in range(case.ranks)]


def lines(case: Case, length: int, predicted: list[int], measured: list[int]) -> list[str]:
    """Of each end of a pipeline; else of the rank that holds most."""
    ends = [range(case.ranks)]
    if (pipeline := case.degrees.get("pipeline", 1)) > 1:
        ends = [ends[0][: case.ranks // pipeline], ends[0][-case.ranks // pipeline :]]
    found = []
    for ranks in ends:
        most = max(ranks, key=lambda rank: measured[rank])
        pair = predicted[most] / 1e6, measured[most] / 1e6
        found.append(
            f"| {case.name} | {length:,} | {most} | {pair[0]:.1f} | {pair[1]:.1f} | {pair[0] / pair[1] - 1:+.1%} |"
        )
    return found


def main() -> None:
    parser = CommandParser(prog="python -m bench.plan_memory", description=__doc__)
    parser.add_argument("names", nargs="*", help="of JSONs (default: all)")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), help="tokens of a row")
    parser.add_argument("--json", type=Path, help="keep what was measured: what is in it is only predicted anew")
    arguments = parser.parse_args()
    for name, value in ALLOCATOR.items():
        os.environ[name] = value
    os.environ["OMP_NUM_THREADS"] = "1"
    import yaml

    from launch.topology import choose_accelerator
    from planner.stand_in import write_stand_in
    from training.config import load_recipe

    choose_accelerator()
    multiprocessing.set_forkserver_preload(["engine.run.begin", "engine.run.plan"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
        recipe = load_recipe(folder / "recipe.yaml", {})
        print("| layout | tokens | rank | predicted, MB | measured, MB | error |\n|---|---|---|---|---|---|")
        known = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {}
        for length in arguments.lengths:
            write_stand_in(folder / str(length), recipe, length, rows=ROWS)
            for case in CASES:
                if arguments.names and case.file not in arguments.names:
                    continue
                place = f"{case.name}, {length} tokens"
                if place not in known:
                    found = measure(folder, case, length)
                    known[place] = [found[rank] for rank in range(case.ranks)]
                    if arguments.json:
                        write_atomically(arguments.json, json.dumps(known).encode())
                for line in lines(case, length, predict(folder, case, length), known[place]):
                    print(line, flush=True)


if __name__ == "__main__":
    run_command(main)
