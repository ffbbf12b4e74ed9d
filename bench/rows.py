"""Memory and time of indexing and packing made-up documents of 64 tokens in the mean, by their number.

    python -m bench.rows [--documents 1000000 10000000]

Each figure is the peak of anonymous memory (what the kernel cannot drop and read again) of a process, above that before:

    left out  equal texts, a third of all, left out; split, index of keys (data_prep/index.py)
    index     the same, with nothing left out
    at once   rows chosen for all documents together: `pack`
    groups    the same rows, chosen group by group and written to shards (data_prep/rows.py), in one process

It takes about 400 bytes a document on the disk. `--documents 100000000 --steps index groups` needs 40 GB and an hour.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from console.command import CommandParser

UNIT_DOCUMENTS, BATCH_DOCUMENTS = 200_000, 20_000
VOCAB_SIZE = 32_000
STEPS = "left out", "index", "at once", "groups"


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


class Peak:
    """Of anonymous memory, above that at the beginning, and the seconds it took."""

    def __enter__(self) -> "Peak":
        self.before = self.most = anonymous_bytes()
        self.started, self.ended = time.perf_counter(), threading.Event()
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def _look(self) -> None:
        while not self.ended.wait(0.02):
            self.most = max(self.most, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        self.result = {"bytes": self.most - self.before, "seconds": time.perf_counter() - self.started}


def batches(first: int, count: int) -> Iterator[Any]:
    from data_prep.unit_file import DocumentBatch

    for start in range(first, first + count, BATCH_DOCUMENTS):
        random = np.random.default_rng(start)
        number = min(BATCH_DOCUMENTS, first + count - start)
        lengths = np.minimum(2 + random.geometric(1 / 62, number), 2000)
        text_hashes = random.integers(0, 2**64, (number, 2), dtype=np.uint64)
        lengths[2::3], text_hashes[2::3] = lengths[1::3][: number // 3], text_hashes[1::3][: number // 3]
        yield DocumentBatch(
            random.integers(3, VOCAB_SIZE, int(lengths.sum()), dtype=np.uint16),
            lengths,
            [str(start + i) for i in range(number)],
            (4 * lengths).tolist(),
            random.integers(0, 2**64, number, dtype=np.uint64).tolist(),
            [hashed.tobytes() for hashed in text_hashes],
        )


def make_units(folder: Path, documents: int) -> list[int]:
    from data_prep.ledger import unit_path
    from data_prep.unit_file import write_unit

    counts = [min(UNIT_DOCUMENTS, documents - start) for start in range(0, documents, UNIT_DOCUMENTS)]
    for unit, count in enumerate(counts):
        write_unit(unit_path(folder, unit), np.dtype(np.uint16), batches(unit * UNIT_DOCUMENTS, count))
    return counts


def measure(step: str, folder: Path, documents: int) -> dict[str, float]:
    from data_prep.index import Tokenized, index_store
    from data_prep.ledger import Ledger
    from data_prep.options import BuildOptions
    from data_prep.pack import pack
    from data_prep.rows import RowJob, choose_rows, write_rows
    from data_prep.store import TokenStore
    from data_prep.tokenizer import open_tokenizer
    from storage.manifest import PackingPolicy

    policy, tokens = PackingPolicy(seq_length=4096), folder / "tokens"
    units = [min(UNIT_DOCUMENTS, documents - start) for start in range(0, documents, UNIT_DOCUMENTS)]
    with Peak() as peak:
        if step in ("index", "left out"):
            ledgers = [
                Ledger(unit=unit, plan_sha256="", input_sha256="", sha256="", file_bytes=0, documents=count)
                for unit, count in enumerate(units)
            ]
            made = Tokenized(ledgers, [0] * len(units), {}, {}, {}, {})
            options = BuildOptions(packing=policy, validation_fraction=0.01, deduplicate=step == "left out")
            index_store(options, ["made"], open_tokenizer(folder / "tokenizer"), made, folder, 1)
        elif step == "at once":
            pack(TokenStore.open(tokens).documents("train", "made").length, policy.row_tokens, policy, 0)
        else:
            places = folder / "data", tokens, folder / "rows", folder / "tokenizer" / "tokenizer.model"
            job = RowJob(*places, policy, 0, False, "bench")
            chosen = [(group, counts) for group, counts, _ in choose_rows(job, 1, lambda tokens: None)]
            write_rows(job, chosen, 1, lambda rows: None)
    return peak.result


def main() -> None:
    parser = CommandParser(prog="python -m bench.rows", description=__doc__)
    add = parser.add_argument
    add("--documents", type=int, nargs="+", default=[10**6, 10**7], help="(default: 1000000 10000000)")
    add("--steps", nargs="+", choices=STEPS, default=STEPS, help="(default: all)")
    add("--folder", type=Path, help="where the documents are made, for minutes (default: a temporary folder)")
    add("--run", nargs=3, metavar=("STEP", "FOLDER", "DOCUMENTS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        step, folder, documents = arguments.run
        print(json.dumps(measure(step, Path(folder), int(documents))))
        return
    from data_prep.tokenizer_files import MODEL_FILE
    from data_prep.tokenizer_training import train

    for documents in arguments.documents:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
            folder = Path(temporary)
            (folder / "tokens").mkdir()
            (folder / "tokenizer").mkdir()
            (folder / "tokenizer" / MODEL_FILE).write_bytes(train(["some words of a text, and more of them"], 300))
            make_units(folder / "tokens", documents)
            for step in arguments.steps:
                command = [sys.executable, "-m", "bench.rows", "--run", step, str(folder), str(documents)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                result = json.loads(done.stdout.splitlines()[-1])
                size = result["bytes"]
                print(
                    f"{documents:>11,} documents  {step:<8} {size / 1e6:8.0f} MB  {size / documents:7.1f} bytes a document"
                    f"  {result['seconds']:7.1f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
