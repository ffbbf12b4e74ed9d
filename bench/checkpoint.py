"""What saving writes and what a move to another layout reads, counted on 2 to 8 ranks and foreseen for 70B on 512.

    python -m bench.checkpoint [--recipe recipes/llama-70b.yaml]

A tiny model (recipes/tiny.yaml, float32) is saved in one layout, continued and saved in the next, and so on, a launch
each. Counted are the bytes of weights and moments that each rank reads for itself, what the system saw it read and
write, memory beyond what it held before, and the seconds of the slowest rank. Then the same code's plan of reads is added up
for the recipe on machines of 512 ranks, without any of them.

First comes how long training stands still for a save: one that waits, one in the background, and a bare copy of as many
bytes from memory to memory that has been used before, by the clock and in CPU time of the first rank; a larger model (about
2 GB of weights and moments), saved several times, in each ZeRO stage.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from bench.corpus import pack
from console.command import CommandParser
from tools.layouts.layout import parse_layout

if TYPE_CHECKING:
    from engine.checkpoint.division import Division

CHAIN = (
    "ZeRO-3 on 2=ds_configs/zero3_fp32.json:2",
    "pipeline 2 x data 2=ds_configs/pipeline_fp32.json:4:2",
    "ZeRO-2 on 8=ds_configs/zero2_fp32.json:8",
    "tensor 2 x data 2=ds_configs/zero1_fp32.json:4 tensor_parallel.autotp_size=2",
    "ZeRO-0 on 4=ds_configs/zero0_fp32.json:4",
    "ZeRO-3 on 8=ds_configs/zero3_fp32.json:8",
    "tensor 2=ds_configs/tensor2_zero0_fp32.json:2",
)
OVERRIDES = {
    "model.num_attention_heads": "4",
    "training.global_batch_tokens": "4096",
    "schedule.schedule": "constant",
    "schedule.warmup_steps": "0",
    "schedule.decay_steps": "null",
    "validation.every_steps": "null",
}
STALLED = tuple(f"ZeRO-{stage} on 2=ds_configs/zero{stage}_fp32.json:2" for stage in range(4))
WIDER = OVERRIDES | {
    "model.hidden_size": "1536",
    "model.intermediate_size": "4096",
    "training.global_batch_tokens": "1024",
    "checkpoint.keep_last": "2",
}
SAVES = 4
BYTES_OF_AN_ELEMENT = 12
"""Of AdamW: weight and two moments in float32."""
ROW_TOKENS = 512


class Spent(NamedTuple):
    """What a piece of work cost one rank."""

    seconds: float
    read_bytes: int
    written_bytes: int
    memory_bytes: int


def spend(work: Callable[[], object]) -> Spent:
    """Read and written as the system counts it at this process's calls, memory at its peak beyond what was held before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, (held, _), began = _system_bytes(), _memory(), time.perf_counter()
    work()
    seconds, after = time.perf_counter() - began, _system_bytes()
    return Spent(seconds, after[0] - before[0], after[1] - before[1], _memory()[1] - held)


def _system_bytes() -> tuple[int, int]:
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"]), int(fields["wchar"])


def _memory() -> tuple[int, int]:
    """Resident now, and at most."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, most = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return now, most


def rank(folder: Path) -> None:
    """What one rank does: continue the newest checkpoint, if there is one, take a step and save."""
    from launch.topology import read_topology

    topology = read_topology()

    import torch.distributed as dist

    from engine.checkpoint.deepspeed_files import CheckpointFiles
    from engine.checkpoint.folder import agree_on_checkpoint
    from engine.checkpoint.saving import save
    from engine.checkpoint.transplant import transplant
    from engine.process_group import start_process_group
    from engine.run.begin import begin
    from engine.run.folder import describe
    from engine.run.plan import make_plan
    from launch.rank import leave

    job, run = json.loads((folder / "job.json").read_text()), folder / "run"
    plan = make_plan(
        "recipes/tiny.yaml", OVERRIDES, job["ds_config"], str(folder / "data"), topology, {"pipeline": job["stages"]}
    )
    start_process_group(topology)
    loop, results = begin(plan), {}
    chosen: list = []
    results["verify"] = spend(lambda: chosen.extend(agree_on_checkpoint(run)))._asdict()
    if chosen[0]:
        with CheckpointFiles(*chosen[0]) as files:
            results["move"] = spend(lambda: transplant(loop.engine, files))._asdict() | {"counted": files.bytes_read}
        loop.state = chosen[0][1].state
    loop.step()
    results["save"] = spend(lambda: save(loop.engine, run, loop.state, describe(plan)))._asdict()
    of_ranks: list = [None] * topology.world_size
    dist.all_gather_object(of_ranks, results)
    if topology.is_first:
        (folder / "results.json").write_text(json.dumps(of_ranks))
    leave(0)


def stall(folder: Path) -> None:
    """What one rank of `measure_stall` does: step and save by turns, waiting and in the background."""
    from launch.topology import read_topology

    topology = read_topology()

    import torch
    import torch.distributed as dist

    from engine.checkpoint.saving import Saves, save
    from engine.process_group import start_process_group
    from engine.run.begin import begin
    from engine.run.folder import describe
    from engine.run.memory import rank_need
    from engine.run.plan import make_plan
    from launch.rank import leave

    ds_config = json.loads((folder / "job.json").read_text())["ds_config"]
    plan = make_plan("recipes/tiny.yaml", WIDER, ds_config, str(folder / "data"), topology, {})
    start_process_group(topology)
    loop, facts = begin(plan), describe(plan)
    saves = Saves(folder / "behind", facts, background=True)
    source, target = (torch.ones(rank_need(plan, rank).snapshot, dtype=torch.uint8) for rank in [topology.rank] * 2)

    def seconds(work: Callable[[], object]) -> tuple[float, float]:
        """By the clock until all ranks have done it, and of the processor for this one."""
        dist.barrier()
        began, used = time.perf_counter(), time.thread_time()
        work()
        used = time.thread_time() - used
        dist.barrier()
        return time.perf_counter() - began, used

    rows = []
    for _ in range(SAVES):
        if topology.is_first:  # no room is needed for more than two
            for name in ("waiting", "behind"):
                shutil.rmtree(folder / name / "checkpoints", ignore_errors=True)
        loop.step()
        waited = seconds(lambda: save(loop.engine, folder / "waiting", loop.state, facts))
        stalled = seconds(lambda: saves.begin(loop.engine, loop.state))
        saves.wait(loop.engine)
        rows.append((*waited, *stalled, *seconds(lambda: target.copy_(source))))
    if topology.is_first:
        (folder / "results.json").write_text(json.dumps({"rows": rows, "bytes": source.numel()}))
    leave(0)


def measure_stall(folder: Path) -> None:
    print(
        f"{'seconds, medians after the first':34s}{'a rank copies':>14s}{'save':>8s}{'stall':>8s}{'copy':>8s}", end=""
    )
    print(f"{'stall/save':>12s}{'stall/copy':>12s}{'in CPU time':>13s}{'first stall':>13s}")
    for name in ("waiting", "behind"):
        (folder / name).mkdir()
    for text in STALLED:
        layout = parse_layout(text)
        (folder / "job.json").write_text(json.dumps({"ds_config": layout.write_config(folder)}))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={layout.ranks}"]
        subprocess.run(
            [*launcher, "-m", "bench.checkpoint", "--stall-of", folder], check=True, stdout=subprocess.DEVNULL
        )
        found = json.loads((folder / "results.json").read_text())
        save, _, stalled, used, copy, least = map(statistics.median, zip(*found["rows"][1:], strict=True))
        print(f"{layout.name:34s}{found['bytes'] / 1e6:11.0f} MB{save:8.3f}{stalled:8.3f}{copy:8.3f}", end="")
        print(
            f"{stalled / save:12.3f}{stalled / copy:12.2f}{used / least:13.2f}{found['rows'][0][2]:13.3f}", flush=True
        )


def measure(folder: Path) -> None:
    """The chain of layouts, a launch each."""
    from engine.checkpoint.manifest import read_manifest, steps
    from model.config import ModelConfig

    print(
        f"{'':22s}{'verify':>8s}{'move: weights and moments read, of a whole':>46s}{'memory':>9s}{'':>9s}   save: written"
    )
    print(f"{'':22s}{'read':>8s}{'all ranks':>16s}{'by the system':>16s}{'one rank':>14s}{'beyond':>9s}{'seconds':>9s}")
    for text in CHAIN:
        layout = parse_layout(text)
        job = {"ds_config": layout.write_config(folder), "stages": layout.stages}
        (folder / "job.json").write_text(json.dumps(job))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={layout.ranks}"]
        subprocess.run(
            [*launcher, "-m", "bench.checkpoint", "--rank-of", folder], check=True, stdout=subprocess.DEVNULL
        )
        ranks = json.loads((folder / "results.json").read_text())
        manifest = read_manifest(steps(folder / "run")[0])
        whole = ModelConfig.model_validate(manifest.recipe["model"]).num_parameters() * BYTES_OF_AN_ELEMENT
        cells = f"{'':8s}{'':55s}{'':9s}"
        if "move" in ranks[0]:
            counted, system = ([r["move"][key] for r in ranks] for key in ("counted", "read_bytes"))
            verified = sum(r["verify"]["read_bytes"] for r in ranks) / whole
            memory, seconds = (max(r["move"][key] for r in ranks) for key in ("memory_bytes", "seconds"))
            cells = (
                f"{verified:8.2f}{sum(counted) / whole:16.2f}{sum(system) / whole:16.2f}{max(counted) / whole:14.2f}"
            )
            cells += f"{memory / 1e6:6.0f} MB{seconds:9.2f}"
        written = sum(size for size, _ in manifest.files.values()) / whole
        system = sum(r["save"]["written_bytes"] for r in ranks) / whole
        print(f"{layout.name:22s}{cells}{written:10.2f} in files, {system:.2f} by the system")
    print(f"a whole: {whole / 1e6:.0f} MB of weights and moments")


def foresee(recipe_file: str) -> None:
    """The recipe's model on 512 ranks, from the plan of reads alone."""
    from engine.checkpoint.foreseen import foreseen_division
    from engine.checkpoint.manifest import StateLayout
    from engine.layout.pipeline import pipeline_bounds
    from training.config import load_recipe

    recipe = load_recipe(recipe_file, {})
    bounds = tuple(pipeline_bounds(recipe.model, 8, "flops", recipe.model.max_position_embeddings))
    layouts = {
        "ZeRO-3 on 512": StateLayout(wrapper="", optimizer="", zero_stage=3, world_size=512),
        "ZeRO-3 on 256": StateLayout(wrapper="", optimizer="", zero_stage=3, world_size=256),
        "8 x 8 x 8": StateLayout(wrapper="", optimizer="", zero_stage=1, world_size=512, stage_bounds=bounds, tensor=8),
    }
    divisions = {name: foreseen_division(recipe.model, recipe.optimizer, layout) for name, layout in layouts.items()}
    whole = recipe.model.num_parameters() * BYTES_OF_AN_ELEMENT
    print(f"\n{recipe_file}: {whole / 1e9:,.0f} GB of weights and moments; 8 x 8 x 8: pipeline, tensor, data (ZeRO-1)")
    print(f"{'':34s}{'all ranks':>10s}{'one rank, most':>16s}{'files':>7s}{'reads':>9s}{'of':>9s}{'planned in':>12s}")
    for before, after in (
        ("ZeRO-3 on 512", "ZeRO-3 on 256"),
        ("ZeRO-3 on 512", "8 x 8 x 8"),
        ("8 x 8 x 8", "ZeRO-3 on 512"),
    ):
        began = time.perf_counter()
        count = layouts[after].world_size
        ranks = [add_up(divisions[before], divisions[after], number) for number in range(count)]
        total, most = (function(r.bytes for r in ranks) for function in (sum, max))
        files, reads = (max(getattr(r, field) for r in ranks) for field in ("files", "reads"))
        mean = total / sum(r.reads for r in ranks)
        print(
            f"{before + ' -> ' + after:34s}{total / whole:10.3f}{most / 1e9:13.2f} GB{files:7d}{reads:9,d}{mean / 1e3:6.0f} kB"
            f"{(time.perf_counter() - began) / count * 1e3:9.0f} ms"
        )


class ReadTotals(NamedTuple):
    """Over a rank's plan of reads, for weight and moments."""

    bytes: int
    files: int
    reads: int


def add_up(source: "Division", target: "Division", number: int) -> ReadTotals:
    elements, runs, files = 0, 0, set()
    for kept in target.kept(number):
        for part, holder, _, box in source.reads(*kept):
            elements += box.rows * box.width
            runs += 1 if box.source_stride == box.width else box.rows
            files.add((part, holder))
    return ReadTotals(elements * BYTES_OF_AN_ELEMENT, len(files), runs * 3)


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--recipe", default="recipes/llama-70b.yaml", help="what is foreseen (default: %(default)s)")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stall-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stall_of:
        stall(arguments.stall_of)
    if arguments.rank_of:
        rank(arguments.rank_of)
    with tempfile.TemporaryDirectory() as folder:
        pack(Path(folder), ROW_TOKENS)
        measure_stall(Path(folder))
        measure(Path(folder))
    foresee(arguments.recipe)


if __name__ == "__main__":
    main()
