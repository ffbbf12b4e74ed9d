"""What a rank of a compared layout does; started by `tools.layouts.layout` on every rank, with the folder of its job."""

import hashlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from console.command import CommandParser

if TYPE_CHECKING:
    from engine.run.loop import TrainingLoop
    from training.batch import Batch


def main(folder: Path) -> int:
    from launch.topology import read_topology

    topology = read_topology()

    from engine.checkpoint.saving import save
    from engine.run.begin import begin_or_continue
    from engine.run.folder import describe
    from engine.run.memory import check_memory
    from engine.run.plan import make_plan
    from engine.run.resume import check_resumable
    from planner.recompute import start_decided

    job = json.loads((folder / "job.json").read_text())
    run = Path(job["run"])
    plan = make_plan(
        job["recipe"], job["overrides"], job["ds_config"], job["data"], topology, {"pipeline": job["stages"]}
    )
    check_resumable(run, plan, allow_data_change=False)
    check_memory(plan, topology)
    plan = start_decided(plan, topology)
    loop = begin_or_continue(plan, run).loop
    with (folder / f"rank-{topology.rank}.jsonl").open("w", buffering=1) as records:
        train(loop, job["last_step"], records)
    save(loop.engine, run, loop.state, describe(plan))
    return 0


def train(loop: "TrainingLoop", last_step: int, records: TextIO) -> None:
    """Train as train.py does; what each step of this rank was goes into `records` (see `tools.layouts.layout.StepRecord`)."""
    from engine.reduction.wire import WireBytes
    from training.environment import peak_memory_bytes

    began = time.perf_counter()
    while loop.state.step < last_step:
        with WireBytes() as wire:
            done = loop.step()
        seconds = time.perf_counter() - began
        record = {key: getattr(done.result, key) for key in ("loss", "grad_norm", "applied")}
        record |= {"step": loop.state.step, "data_rank": loop.plan.mesh.data_rank, "rows": digests(done.micro_batches)}
        record |= {
            "seconds": seconds,
            "memory_bytes": peak_memory_bytes(loop.engine.device),
            "wire_bytes": wire.ring_total,
        }
        records.write(json.dumps(record) + "\n")
        began = time.perf_counter()


def digests(micro_batches: list["Batch"]) -> list[str]:
    """One for each row [T]: its tokens, where its documents begin and what is to be predicted."""
    import torch

    parts = ((batch["input_ids"], batch["position_ids"], batch["targets"]) for batch in micro_batches)
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    rows = torch.stack(columns, dim=1).numpy()  # [B, 3, T]
    return [hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest() for row in rows]


if __name__ == "__main__":
    parser = CommandParser(prog="python -m tools.layouts.rank", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of the job")
    given = parser.parse_args()

    from launch.rank import run_rank

    run_rank(lambda: main(given.folder))
