"""Reading packed rows beside its alternatives, on the same rows in the same run (about a minute, 0.5 GB of disk).

    python -m bench.loader [--rows 20480]

Per sample: random rows of T = 4096 tokens, uint16 in the page cache, become int64 batches of 8 rows. Contenders take
turns for many short rounds and the fastest round of each counts, in CPU time. The unit is the bare widening copy: uint16
rows of a mapped file assigned to a reused int64 buffer, below which nothing that makes input_ids can go.

To the first batch: an index of 10^9 rows (as many shards as 4096-token rows would need, all the same small file), opened
in a fresh process and shuffled; what grows is the manifest's list of shards. Beside it what
`torch.utils.data.DistributedSampler` does at the start of every epoch in every rank. Last, what `tools.ledger` asks of such
a data set: when documents are trained on, and what steps have.
"""

import sys
import tempfile
import time
from pathlib import Path

from console.command import CommandParser
from storage.shards import open_split


def main() -> None:
    parser = CommandParser(prog="python -m bench.loader", description=__doc__)
    parser.add_argument("--rows", type=int, default=20480, help="rows to read from (default: %(default)s)")
    arguments = parser.parse_args()
    import torch

    from bench.loader_readers import (
        INDEX_ROWS,
        SEQ_LENGTH,
        TARGET_RATIO,
        TARGET_SECONDS,
        first_batch,
        first_indices,
        in_fresh_process,
        ledger_answers,
        measure,
        write_data,
        write_documents,
        write_index,
    )

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_data(root / "rows", arguments.rows, SEQ_LENGTH)
        started = time.perf_counter()
        dataset = open_split(root / "rows", "train")
        print(
            f"{len(dataset):,} rows of {SEQ_LENGTH:,} tokens; opened and checked in {time.perf_counter() - started:.3f} s"
        )
        print(f"\n{'per sample':<56}{'us':>8}{'x bare':>8}{'Mtok/s':>9}")
        result = measure(root / "rows", dataset)
        bare = next(iter(result.values()))
        for name, us in result.items():
            print(f"{name:<56}{us:>8.2f}{us / bare:>8.2f}{SEQ_LENGTH / us:>9.0f}")
        print(f"\n{'to the first batch':<56}{'rows':>14}{'seconds':>9}{'MB more':>9}")
        for rows in (10**6, INDEX_ROWS):
            (root / str(rows)).mkdir()
            write_index(root / str(rows), rows)
            ours = in_fresh_process(first_batch, root / str(rows))
            name = f"this loader (of that opening the manifest {ours['open_seconds']:.3f} s)"
            print(f"{name:<56}{ours['rows']:>14,}{ours['seconds']:>9.3f}{ours['megabytes']:>9.0f}")
        for rows in (10**6, 10**7):
            theirs = in_fresh_process(first_indices, rows)
            print(
                f"{'DistributedSampler':<56}{theirs['rows']:>14,}{theirs['seconds']:>9.3f}{theirs['megabytes']:>9.0f}"
            )
        asked = write_documents(root / str(INDEX_ROWS))
        answers = in_fresh_process(ledger_answers, " ".join(map(str, [root / str(INDEX_ROWS), *asked])))
        print(
            f"\nledger of {answers['rows']:,} rows and documents, index not in memory: {answers['seconds']:.2f} s for all,"
        )
        print(f"{answers['document_ms']:.1f} ms a document, {answers['step_ms']:.1f} ms a step of 1,024 rows")
    ratio = result["this reader: input_ids"] / bare
    print(f"\ninput_ids at {ratio:.2f}x the bare copy (target {TARGET_RATIO}x)", end="; ")
    print(f"first batch of 10^9 rows after {ours['seconds']:.2f} s (target {TARGET_SECONDS} s)")
    if ratio > TARGET_RATIO or ours["seconds"] > TARGET_SECONDS:
        sys.exit(1)


if __name__ == "__main__":
    main()
