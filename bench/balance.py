"""What dealing rows out by their attention cost gains: recipes/tiny.yaml on two ranks, with and without, step by step.

    python -m bench.balance [--steps 6]

Half of the rows of 4,096 tokens hold a stretch of one of Shakespeare's plays, half are packed from short speeches: as many
tokens, a small part of the attention. First, how unevenly the attention of these rows is spread over more ranks, from the
rows alone; and that of long rows over the ranks of a sequence group, which share them: in order, in a zigzag (the i-th stretch
from the left with the i-th from the right), and dealt as with "sequence_parallel_exchange": "keys". Then both ways take the
same steps in turn, with the same rows, in one process a rank, so that a busy machine slows both alike; the ratio is the
median over the steps.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np

from bench.corpus import PLAYS, pack
from bench.ranks import run_ranks
from console.command import CommandParser
from storage.shards import open_split
from training.config import load_recipe

RANKS, ROWS_A_STEP, ROW_TOKENS = 2, 8, 4096
WAYS = {"in order": "false", "by attention": "true"}


def prepare(folder: Path, row_tokens: int = ROW_TOKENS) -> None:
    """Plays, and their speeches as documents of their own, packed into rows."""
    speeches = [part for play in sorted(PLAYS.rglob("*.md")) for part in play.read_text().split("\n\n") if part.strip()]
    with (folder / "speeches.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": speech}) + "\n" for speech in speeches)
    pack(folder, row_tokens, [f"--source=plays={PLAYS}:1", f"--source=speeches={folder / 'speeches.jsonl'}:1"])


def spread(data: Path, steps: int = 100) -> None:
    """Print how much more attention the busiest of so many ranks has than the average one, both ways."""
    from training.balance import deal, imbalance, row_costs
    from training.data import TrainingData, training_order

    dataset, recipe = open_split(data, "train"), load_recipe("recipes/tiny.yaml", {})
    order = training_order(dataset, recipe.data, seed=0)
    places = TrainingData(dataset, order).places
    print(f"attention of the busiest rank beyond the average, mean of {steps} steps\n{'':24s}", *WAYS, sep="   ")
    for ranks, rows in ((2, 4), (8, 4), (8, 1), (64, 4)):
        found: dict[str, list[float]] = {way: [] for way in WAYS}
        for step in range(steps):
            costs = row_costs(dataset, *places(step * ranks * rows + np.arange(ranks * rows)), recipe.model.visibility)
            found["in order"].append(imbalance(costs.reshape(rows, ranks).sum(0)))
            found["by attention"].append(imbalance(costs[deal(costs, 1, ranks)].sum((0, 2))))
        cells = "".join(f"{np.mean(values):>12.1%}" for values in found.values())
        print(f"{ranks:3d} ranks, {rows} rows each {cells}")


def spread_in_rows(ranks: int = 8, seeds: int = 5) -> None:
    """Print the same for ranks that share a row, and which part of what a gather of all keys sends they need."""
    import torch

    from engine.layout.deal import dealt_columns
    from model.documents import Documents
    from model.segments import seen_keys, segments
    from model.visibility import Visibility
    from training.balance import imbalance

    visibility, ways = Visibility(), ("in order", "zigzag", "dealt")
    print(
        f"\nthe same over {ranks} ranks that share a row, mean (worst) of {seeds}, and the keys sent, of those of a gather"
    )
    print(f"{'':38s}", *(f"{way:>17s}" for way in ways), "      sent, dealt")
    for tokens, about in ((32768, 1024), (131072, 1024), (131072, 4096), (131072, 16384), (131072, 2 * 131072)):
        found: dict[str, list[float]] = {way: [] for way in (*ways, "sent")}
        for seed in range(seeds):
            lengths = packed(tokens, about, seed)
            places = torch.cat([torch.arange(length) for length in lengths])
            documents = Documents.from_position_ids(places.unsqueeze(0))
            halves = torch.arange(tokens).view(2 * ranks, -1)
            dealt = {
                "in order": list(torch.arange(tokens).view(ranks, -1)),
                "zigzag": [torch.cat([halves[rank], halves[-1 - rank]]) for rank in range(ranks)],
                "dealt": dealt_columns(documents, visibility, ranks),
            }
            for way in ways:
                found[way].append(imbalance(np.array([int((places[columns] + 1).sum()) for columns in dealt[way]])))
            sent = 0
            for columns in dealt["dealt"]:
                seen = seen_keys(segments(documents, columns), visibility, tokens)
                sent += int(seen.sum() - seen[columns].sum())
            found["sent"].append(sent / (ranks - 1) / tokens)
        cells = (f"{np.mean(values):>8.1%} ({max(values):>6.1%})" for values in found.values())
        name = "one document" if about > tokens else f"documents of about {about:,}"
        print(f"rows of {tokens:>7,}, {name:22s}", *cells)


def packed(tokens: int, about: int, seed: int) -> list[int]:
    """Lengths of documents from half to one and a half of `about`, the last one cut at the end of the row."""
    rng, lengths = np.random.default_rng(seed), []
    while tokens:
        lengths.append(min(tokens, int(rng.integers(about // 2, 3 * about // 2 + 1))))
        tokens -= lengths[-1]
    return lengths


def rank(folder: Path, steps: int) -> None:
    """What one rank does: both ways in turn. The first rank writes seconds and imbalance of every step."""
    from launch.topology import read_topology

    topology = read_topology()

    from engine.process_group import start_process_group
    from engine.run.begin import begin
    from engine.run.plan import make_plan
    from launch.rank import leave
    from training.throughput import StepClock

    runs = {}
    start_process_group(topology)
    (folder / "zero1.json").write_text('{"zero_optimization": {"stage": 1}}')
    for way, value in WAYS.items():
        overrides = {
            "training.global_batch_tokens": str(ROWS_A_STEP * ROW_TOKENS),
            "training.max_steps": str(steps + 1),
            "schedule.schedule": "constant",
            "schedule.warmup_steps": "0",
            "schedule.decay_steps": "null",
            "validation.every_steps": "null",
            "data.balance_attention": value,
        }
        plan = make_plan("recipes/tiny.yaml", overrides, str(folder / "zero1.json"), str(folder / "data"), topology)
        runs[way] = begin(plan)
    results: dict[str, list[dict]] = {way: [] for way in WAYS}
    for step in range(steps + 1):
        for way, loop in runs.items():
            clock = StepClock(peak_flops_per_second=1.0)
            result = loop.step(clock.waiting_for_data).result
            clock.step_done(tokens=0)
            rates = clock.read()
            record = {
                "seconds": rates.step_seconds * (1 - rates.data_wait_fraction),
                "imbalance": result.attention_imbalance,
                "loss": result.loss,
            }
            results[way] += [record] * (step > 0)  # the first loads the kernels
    if topology.is_first:
        (folder / "results.json").write_text(json.dumps(results))
    leave(0)


def report(results: dict[str, list[dict]]) -> None:
    print(f"\n{RANKS} ranks, {ROWS_A_STEP} rows of {ROW_TOKENS:,} tokens a step\n")
    print(f"{'rows dealt':14s}{'attention of the busier rank beyond the average':>50s}{'seconds a step':>16s}")
    for way, records in results.items():
        spread = [record["imbalance"] for record in records]
        cell = f"mean {statistics.mean(spread):.1%}, worst {max(spread):.1%}"
        print(f"{way:14s}{cell:>50s}{statistics.median(record['seconds'] for record in records):16.2f}")
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(*results.values(), strict=True)]
    print(f"\nspeed-up {statistics.median(ratios):.2f}x (steps {', '.join(f'{ratio:.2f}' for ratio in ratios)})")
    difference = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(*results.values(), strict=True))
    print(f"losses of the same steps agree to {difference:.1e}")


def main() -> None:
    parser = CommandParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of each way (default: %(default)s)")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        rank(arguments.rank_of, arguments.steps)
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        spread(Path(folder) / "data")
        spread_in_rows()
        report(run_ranks("bench.balance", RANKS, Path(folder), arguments.steps))


if __name__ == "__main__":
    main()
