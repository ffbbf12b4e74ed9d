"""What the statistics of layers cost: steps that are watched beside steps that are not, in turn, in one run.

    python -m bench.layers [--recipe recipes/tiny.yaml] [--deepspeed_config ds_configs/zero2_fp32.json] [--pairs 12]

One process, rows of 512 tokens of Shakespeare, CPU seconds. Every second step is watched; what it takes more than the step
after it, in the median, is spread over the steps from one watched step to the next at the default interval.
"""

import statistics
import tempfile
import time
from pathlib import Path

from bench.corpus import pack
from console.command import CommandParser

ROW_TOKENS = 512


def seconds_of_steps(folder: Path, recipe: str, ds_config: str, pairs: int) -> tuple[list[float], list[float]]:
    """CPU time of the watched steps and of those after them, without the first of each."""
    from engine.process_group import start_process_group
    from engine.run.begin import begin
    from engine.run.plan import make_plan
    from launch.topology import read_topology

    topology, steps = read_topology(), 2 * pairs + 2
    overrides = {
        "training.global_batch_tokens": str(8 * ROW_TOKENS),
        "training.micro_batch_samples": "4",
        "training.max_steps": str(steps),
        "schedule.warmup_steps": "2",
        "schedule.decay_steps": "2",
        "validation.every_steps": "null",
        "logging.layer_statistics_every_steps": "2",
    }
    plan = make_plan(recipe, overrides, ds_config, str(folder / "data"), topology)
    start_process_group(topology)
    loop = begin(plan)
    found: dict[bool, list[float]] = {True: [], False: []}
    for step in range(1, steps + 1):
        began = time.process_time()
        watched = loop.step().layers is not None
        if step > 2:
            found[watched].append(time.process_time() - began)
    loop.engine.close()
    return found[True], found[False]


def main() -> None:
    parser = CommandParser(prog="python -m bench.layers", description=__doc__)
    parser.add_argument("--recipe", default="recipes/tiny.yaml", help="what is trained (default: %(default)s)")
    parser.add_argument("--deepspeed_config", default="ds_configs/zero2_fp32.json", help="how (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=12, help="steps of each kind (default: %(default)s)")
    arguments = parser.parse_args()

    from training.sections import MetricsConfig

    with tempfile.TemporaryDirectory() as folder:
        pack(Path(folder), ROW_TOKENS)
        watched, others = seconds_of_steps(Path(folder), arguments.recipe, arguments.deepspeed_config, arguments.pairs)
    more = [with_look - without for with_look, without in zip(watched, others, strict=True)]
    usual, extra = statistics.median(others), statistics.median(more)
    every = MetricsConfig().layer_statistics_every_steps
    print(f"a step               {usual:8.3f} s")
    print(f"more when watched    {extra:8.3f} s, {extra / usual:.2%} of a step")
    print(f"every {every:>3} steps      {extra / usual / every:8.3%} of the time")


if __name__ == "__main__":
    main()
