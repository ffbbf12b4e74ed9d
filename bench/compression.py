"""Bytes a step and the loss curve of compressed gradients beside uncompressed ones: recipes/tiny.yaml on two ranks.

    python -m bench.compression [--steps 40]

The same model, data and order of samples for every contender, ZeRO stage 0 in float32, steps of 2,048 tokens of
Shakespeare's plays. Bytes are counted at the calls of torch.distributed during a whole training step after the warm-up
(engine/reduction/wire.py): `handed in` is the payload that a rank gives to them, `ring` what leaves the rank for it in
bandwidth-optimal algorithms. The loss is the mean of the last steps up to the one named, in nats a target.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.corpus import pack
from bench.ranks import run_ranks
from console.command import CommandParser

if TYPE_CHECKING:
    from launch.topology import Topology

RANKS, STEP_TOKENS, ROW_TOKENS, WARMUP_STEPS, MEAN_OF = 2, 2048, 256, 10, 5
BASE: dict[str, Any] = {"zero_optimization": {"stage": 0}}
CONTENDERS: dict[str, dict[str, Any]] = {
    "uncompressed": {},
    "bf16 communication": {"communication_data_type": "bf16"},
    "PowerSGD, rank 4": {"gradient_compression": {"method": "powersgd", "rank": 4, "warmup_steps": WARMUP_STEPS}},
    "PowerSGD, rank 32": {"gradient_compression": {"method": "powersgd", "rank": 32, "warmup_steps": WARMUP_STEPS}},
    "1 bit": {"gradient_compression": {"method": "onebit", "warmup_steps": WARMUP_STEPS}},
}


def rank(folder: Path, steps: int) -> None:
    """What one rank does: all contenders, one after the other."""
    from launch.topology import read_topology

    topology = read_topology()

    from engine.process_group import start_process_group
    from launch.rank import leave

    results = {}
    start_process_group(topology)
    for name, difference in CONTENDERS.items():
        began = time.perf_counter()
        results[name] = train(folder, BASE | difference, steps, topology)
        if topology.is_first:
            print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    if topology.is_first:
        (folder / "results.json").write_text(json.dumps(results))
    leave(0)


def train(folder: Path, ds_config: dict[str, Any], steps: int, topology: "Topology") -> list[dict]:
    """Loss, and bytes handed in and in a ring, of each step."""
    from engine.reduction.wire import WireBytes
    from engine.run.begin import begin
    from engine.run.plan import make_plan

    file = folder / f"rank-{topology.rank}.json"
    file.write_text(json.dumps(ds_config))
    overrides = {
        "training.global_batch_tokens": str(STEP_TOKENS),
        "training.micro_batch_samples": str(STEP_TOKENS // ROW_TOKENS // RANKS),
        "training.max_steps": str(steps),
        "schedule.decay_steps": str(steps // 3),
        "validation.every_steps": "null",
    }
    plan = make_plan("recipes/tiny.yaml", overrides, str(file), str(folder / "data"), topology)
    loop, records = begin(plan), []
    for _ in range(steps):
        with WireBytes() as wire:
            result = loop.step().result
        records.append({"loss": result.loss, "bytes": wire.total, "ring": wire.ring_total})
    loop.engine.close()
    return records


def report(results: dict[str, list[dict]], steps: int) -> None:
    width = max(map(len, results))
    first = results["uncompressed"][-1]
    print(f"{'bytes a step':<{width}}{'handed in':>14}{'ratio':>9}{'ring':>14}{'ratio':>9}")
    for name, records in results.items():
        last = records[-1]
        cells = (f"{last[key]:>14,.0f}{first[key] / last[key]:>9.2f}" for key in ("bytes", "ring"))
        print(f"{name:<{width}}{''.join(cells)}")
    shown = sorted({MEAN_OF, *range(WARMUP_STEPS, steps + 1, max(1, steps // 60) * 5), steps})
    print(f"\n{'loss after step':<{width}}" + "".join(f"{step:>8}" for step in shown))
    for name, records in results.items():
        means = (statistics.mean(record["loss"] for record in records[step - MEAN_OF : step]) for step in shown)
        print(f"{name:<{width}}" + "".join(f"{mean:>8.3f}" for mean in means))


def main() -> None:
    parser = CommandParser(prog="python -m bench.compression", description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps, 20 or more (default: %(default)s)")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        rank(arguments.rank_of, arguments.steps)
    with tempfile.TemporaryDirectory() as folder:
        pack(Path(folder), ROW_TOKENS)
        report(run_ranks("bench.compression", RANKS, Path(folder), arguments.steps), arguments.steps)


if __name__ == "__main__":
    main()
