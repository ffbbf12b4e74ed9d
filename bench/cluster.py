"""A build's tokenizing on a Ray cluster of two CPUs beside the pool of two processes, on the same text, in turns.

    python -m bench.cluster [--megabytes 96] [--turns 2]

The cluster runs before; what is measured is the whole build, its workers' start included, by the clock. Text: `bench.data`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.data import SEQ_LENGTH, prepare
from console.command import CommandParser

POOL, RAY = "pool of 2", "Ray, 2 CPUs"


def seconds(folder: Path, address: str | None) -> tuple[float, str]:
    """What a build takes, and its fingerprint."""
    from data_prep.build import How, build
    from data_prep.options import BuildOptions
    from data_prep.plan import Plan
    from data_prep.sources import parse_sources
    from data_prep.tokenizer import open_tokenizer
    from storage.manifest import PackingPolicy

    if address:
        import ray  # noqa: F401 (the clock starts after imports)
    tokenizer = open_tokenizer(folder / "tokenizer")
    options = BuildOptions(packing=PackingPolicy(seq_length=SEQ_LENGTH), validation_fraction=0)
    with tempfile.TemporaryDirectory(dir=folder) as output:
        started = time.perf_counter()
        plan = Plan(parse_sources([str(folder / "corpus.jsonl")], []), options, tokenizer)
        manifest = build(plan, tokenizer, Path(output), How(2, "fail", "plain", address))
        return time.perf_counter() - started, manifest.fingerprint


def main() -> None:
    parser = CommandParser(prog="python -m bench.cluster", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=96, help="size of the text (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=2, help="builds of each (default: %(default)s)")
    parser.add_argument("--run", nargs=2, metavar=("FOLDER", "ADDRESS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(seconds(Path(arguments.run[0]), arguments.run[1] or None)))
        return
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = prepare(folder, arguments.megabytes)["corpus"] / 1e6
        node = {"num_cpus": 2, "object_store_memory": 80_000_000, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=node)
        best: dict[str, float] = {}
        fingerprints = set()
        try:
            for name, address in ((POOL, ""), (RAY, cluster.address)) * arguments.turns:
                command = [sys.executable, "-m", "bench.cluster", "--run", str(folder), address]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                taken, fingerprint = json.loads(done.stdout.splitlines()[-1])
                fingerprints.add(fingerprint)
                best[name] = min(taken, best.get(name, taken))
                print(f"  {name:<12} {taken:6.1f} s {size / taken:6.2f} MB/s", flush=True)
        finally:
            cluster.shutdown()
    assert len(fingerprints) == 1
    print(f"Ray / pool {best[POOL] / best[RAY]:.2f} (aim: >= 0.9), the same fingerprint")


if __name__ == "__main__":
    main()
