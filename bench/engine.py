"""Steps through DeepSpeed beside a bare DistributedDataParallel loop and `transformers`' Trainer: recipes/tiny.yaml, two ranks.

    python -m bench.engine [--steps 6] [--recipe R] [--set zero_optimization.reduce_bucket_size=2000000]

The same model, batches and AdamW for all, in float32 with the shipped JSONs of ZeRO 0 to 3; the Trainer has the equal LLaMA of
`transformers` and the same JSON. All live in the same processes and take turns, a step each, so that a busy machine slows all
alike. What a stage sends is counted during one of its steps and then sent once more by itself, in calls of the same number and
mean size; what that takes more than DistributedDataParallel's one sum of all gradients is the stage's own, and is taken off in
the last column. With --profile FOLDER a torch.profiler trace of a step of each is kept, and what took most is printed.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.corpus import pack
from bench.ranks import run_ranks
from console.command import CommandParser

RANKS, ROW_TOKENS = 2, 512


def rank(folder: Path) -> None:
    """What one rank does: makes all contestants, then lets them take turns."""
    from launch.topology import read_topology

    topology, asked = read_topology(), json.loads((folder / "asked.json").read_text())

    import torch
    import torch.distributed as dist

    from bench.engine_contestants import BARE, contestants, sending_seconds, sent
    from engine.process_group import start_process_group
    from engine.run.plan import make_plan
    from launch.rank import leave

    def plan_of(stage: int) -> tuple[Any, Path]:
        file = folder / f"zero{stage}-{topology.rank}.json"
        config = json.loads(Path(f"ds_configs/zero{stage}_fp32.json").read_text())
        for key, value in asked["set"].items():
            section, _, name = key.rpartition(".")
            (config[section] if section else config)[name] = value
        file.write_text(json.dumps(config))
        overrides = {
            "training.max_steps": "1000",
            "schedule.decay_steps": "100",
            "validation.every_steps": "null",
            "logging.layer_statistics_every_steps": str(asked["layer_statistics"]),
        }
        return make_plan(asked["recipe"], overrides, str(file), str(folder / "data"), topology), file

    start_process_group(topology)
    steps = contestants(plan_of, asked["contestants"])
    gradients = 4 * plan_of(0)[0].recipe.model.num_parameters()
    traffic = {}
    for name, step in steps.items():
        step()
        traffic[name] = sent(step, gradients if name == BARE else None)
    found: dict[str, list[dict]] = {name: [] for name in steps}
    for number in range(asked["steps"]):
        for name in [*steps][number % len(steps) :] + [*steps][: number % len(steps)]:
            dist.barrier()
            began, work = time.perf_counter(), time.process_time()
            steps[name]()
            dist.barrier()
            seconds, work = time.perf_counter() - began, time.process_time() - work
            found[name].append({"seconds": seconds, "work": work, "sending": sending_seconds(traffic[name])})
    for name, step in steps.items():
        if asked["profile"] and topology.is_first:
            with torch.profiler.profile() as profiler:
                step()
            profiler.export_chrome_trace(str(Path(asked["profile"]) / f"{name.replace(' ', '-')}.json.gz"))
            print(name, profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=14), file=sys.stderr)
        elif asked["profile"]:
            step()
    if topology.is_first:
        for name, records in found.items():
            records[0]["sent"] = {kind: [calls, size] for kind, (calls, size) in traffic[name].items()}
        (folder / "results.json").write_text(json.dumps(found))
    leave(0)


def report(found: dict[str, list[dict]], step_tokens: int) -> None:
    """Medians; a ratio is that of a step to the bare loop's in the same round."""
    bare = next(iter(found.values()))
    print(f"{'':24}tokens/s  by the clock (rounds)   less sends  by CPU time   sends: MB  calls  seconds alone")
    for name, records in found.items():
        seconds, sending = (statistics.median(each[key] for each in records) for key in ("seconds", "sending"))
        pairs = [*zip(bare, records, strict=True)]
        clock = [first["seconds"] / each["seconds"] for first, each in pairs]
        work = [first["work"] / each["work"] for first, each in pairs]
        less = [first["seconds"] / (each["seconds"] - each["sending"] + first["sending"]) for first, each in pairs]
        calls = records[0]["sent"].values()
        print(
            f"{name:24}{step_tokens / seconds:8,.0f}{statistics.median(clock):8.3f} ({min(clock):.3f} to {max(clock):.3f})"
            f"{statistics.median(less):13.3f}{statistics.median(work):13.3f}"
            f"{sum(number * size for number, size in calls) / 1e6:12,.0f}{sum(number for number, _ in calls):7,}{sending:15.3f}"
        )


def main() -> None:
    parser = CommandParser(prog="python -m bench.engine", description=__doc__)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each (default: %(default)s)")
    parser.add_argument("--recipe", default="recipes/tiny.yaml", help="what is trained (default: %(default)s)")
    parser.add_argument(
        "--contestants", nargs="+", help="of those that are printed (default: all); the bare loop always"
    )
    parser.add_argument("--layer_statistics", type=int, default=100, help="every so many steps (default: %(default)s)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change the JSONs")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="keep a trace of a step of each there")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        rank(arguments.rank_of)
    from training.config import load_recipe

    changes = dict(each.partition("=")[::2] for each in arguments.set)
    asked = {
        "recipe": arguments.recipe,
        "contestants": arguments.contestants,
        "layer_statistics": arguments.layer_statistics,
        "steps": arguments.steps,
        "set": {key: json.loads(value) for key, value in changes.items()},
        "profile": str(arguments.profile.resolve()) if arguments.profile else None,
    }
    if arguments.profile:
        arguments.profile.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "asked.json").write_text(json.dumps(asked))
        pack(Path(folder), ROW_TOKENS)
        found = run_ranks("bench.engine", RANKS, Path(folder), arguments.steps)
    report(found, load_recipe(arguments.recipe, {}).training.global_batch_tokens)


if __name__ == "__main__":
    main()
