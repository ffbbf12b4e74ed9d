"""What a rank of a compared layout does; started by `tools.layouts` on every rank, with the folder of its job."""

import hashlib
import json
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.command import CommandParser

if TYPE_CHECKING:
    from engine.run.plan import RunPlan
    from launch.topology import Topology
    from training.state import TrainState


def main(folder: Path) -> int:
    from launch.topology import read_topology

    topology = read_topology()

    from engine.checkpoint.folder import agree_on_checkpoint, save
    from engine.process_group import start_process_group
    from engine.run.folder import describe
    from engine.run.loop import new_state
    from engine.run.memory import check_memory
    from engine.run.plan import make_plan
    from engine.run.resume import check_resumable, restore
    from engine.step import build_engine

    job = json.loads((folder / "job.json").read_text())
    run = Path(job["run"])
    plan = make_plan(job["recipe"], job["overrides"], job["ds_config"], job["data"], topology, job["stages"])
    check_resumable(run, plan, allow_data_change=False)
    check_memory(plan, topology)
    start_process_group(topology)
    engine = build_engine(plan)
    found, _ = agree_on_checkpoint(run)
    state = restore(engine, *found) if found else new_state(plan)
    with (folder / f"rank-{topology.rank}.jsonl").open("w", buffering=1) as records:
        train(engine, plan, state, job["last_step"], topology, records)
    save(engine, run, state, describe(plan))
    return 0


def train(engine, plan: "RunPlan", state: "TrainState", last_step: int, topology: "Topology", records) -> None:
    """Train as train.py does; what each step of this rank was goes into `records` (see `tools.layouts.Step`)."""
    from engine.reduction.wire import WireBytes
    from engine.run.loop import optimizer_steps
    from engine.step import train_step
    from training.environment import peak_memory_bytes

    began = time.perf_counter()
    for micro_batches in islice(optimizer_steps(plan, state, topology), last_step - state.step):
        with WireBytes() as wire:
            rate, z_loss_weight = plan.learning_rate(state.step + 1), plan.recipe.training.z_loss_weight
            result = train_step(engine, micro_batches, rate, z_loss_weight)
        seconds = time.perf_counter() - began
        state.advance(plan.stage_of(state.step + 1).batch.samples, plan.step_tokens, result.applied)
        record = {key: getattr(result, key) for key in ("loss", "grad_norm", "applied")}
        record |= {"step": state.step, "data_rank": plan.mesh.data_rank, "rows": digests(micro_batches)}
        record |= {
            "seconds": seconds,
            "memory_bytes": peak_memory_bytes(topology.device),
            "wire_bytes": wire.ring_total,
        }
        records.write(json.dumps(record) + "\n")
        began = time.perf_counter()


def digests(micro_batches: list[dict]) -> list[str]:
    """One for each row [T]: its tokens, where its documents begin and what is to be predicted."""
    import torch

    columns = [torch.cat([batch[key] for batch in micro_batches]) for key in ("input_ids", "position_ids", "targets")]
    rows = torch.stack(columns, dim=1).numpy()  # [B, 3, T]
    return [hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest() for row in rows]


if __name__ == "__main__":
    parser = CommandParser(prog="python -m tools.layout_rank", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of the job")
    given = parser.parse_args()

    from launch.rank import run_rank

    run_rank(lambda: main(given.folder))
