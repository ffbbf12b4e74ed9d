"""Bytes on the wire are counted at the calls: every kind of call, whoever makes it, in every ZeRO stage."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from engine.reduction.wire import OPERATIONS, WireBytes
from tests.engine.programs import Run, join_process_group, prepare, zero

MICRO_BATCHES = 2
SPLIT = {"training.micro_batch_samples": "2"}


def every_call() -> dict:
    """Each kind of call once or twice with 10 float32 (40 bytes), some where nobody looks."""
    join_process_group()
    rank, ten, untouched = dist.get_rank(), torch.ones(10), vars(ProcessGroup).copy()
    with WireBytes() as wire:
        dist.all_reduce(ten)
        weight = torch.ones(10, requires_grad=True)
        weight.register_hook(lambda gradient: dist.all_reduce(gradient.bfloat16()))
        weight.sum().backward()
        dist.all_gather([torch.empty(10), torch.empty(10)], ten)
        dist.all_gather_single(torch.empty(20), ten, async_op=True).wait()
        dist.reduce_scatter_single(torch.empty(5), ten)
        dist.all_to_all_single(torch.empty(10), ten)
        dist.broadcast(ten, 0)
        dist.reduce(ten, 0)
        dist.gather(ten, [torch.empty(10), torch.empty(10)] if rank == 0 else None, 0)
        dist.scatter(torch.empty(10), [ten, ten] if rank == 0 else None, 0)
        (dist.send if rank == 0 else dist.recv)(ten, 1 - rank)
        requests = [dist.P2POp(dist.isend, ten, 1 - rank), dist.P2POp(dist.irecv, torch.empty(10), 1 - rank)]
        for request in dist.batch_isend_irecv(requests):
            request.wait()
        dist.barrier()
        with WireBytes() as inner:
            dist.all_reduce(ten.double())
    dist.all_reduce(ten)
    return {
        "by_operation": {key: (t.calls, t.bytes, t.ring_bytes) for key, t in wire.by_operation.items()},
        "totals": (wire.total, wire.ring_total, inner.total),
        "restored": all(vars(ProcessGroup)[key] is value for key, value in untouched.items()),
    }


def stages(folder: str, recipe: str, data: str) -> dict:
    """By stage and communication type: the second step's calls."""
    results = {}
    autocast = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    Run(recipe, data, zero(1, **autocast), Path(folder) / "autocast").close()  # leaves nothing to the next
    for stage in range(4):
        for dtype in ("fp32", "bf16"):
            config = zero(stage, communication_data_type=dtype)
            run = Run(recipe, data, config, Path(folder) / f"{stage}-{dtype}", SPLIT)
            run.steps(1)
            with WireBytes() as wire:
                run.steps(1)
            results[stage, dtype] = wire.by_operation, run.plan.recipe.model.num_parameters()
            run.close()
    return results


def test_every_call_is_counted_exactly(on_ranks):
    results = on_ranks(2, every_call)
    for rank, result in enumerate(results):
        first = rank == 0
        assert result["by_operation"] == {
            "all_reduce": (3, 40 + 20 + 80, 140),
            "all_gather": (2, 80, 80),
            "reduce_scatter": (1, 40, 20),
            "all_to_all": (1, 40, 20),
            "broadcast": (1, 40 * first, 40 * first),
            "reduce": (1, 40, 40),
            "gather": (1, 40, 40),
            "scatter": (1, 80 * first, 40 * first),
            "send": (1 + first, 40 + 40 * first, 40 + 40 * first),
        }
        values = result["by_operation"].values()
        assert result["totals"] == (sum(v[1] for v in values), sum(v[2] for v in values), 80)
        assert result["restored"]


def test_every_method_that_moves_data_is_known():
    """Another torch may call them differently; then a name is missing here and nothing would be counted."""
    idle = {"barrier", "monitored_barrier", "recv", "recv_anysource"}
    words = ("gather", "scatter", "reduce", "all_to_all", "alltoall", "broadcast", "send", "recv", "barrier")
    methods = {name for name in vars(ProcessGroup) if any(word in name for word in words)}
    assert methods - idle <= {method for methods in OPERATIONS.values() for method in methods}


@pytest.fixture(scope="module")
def by_stage(tmp_path_factory, on_ranks):
    folder = tmp_path_factory.mktemp("wire")
    return on_ranks(2, stages, str(folder), *prepare(folder, blocks=2))


def test_stage_0_hands_in_each_gradient_once(by_stage):
    for rank in by_stage:
        calls, parameters = rank[0, "fp32"]
        # targets and each rank's attention before the step, objective and loss after it
        sums_of_the_step = (3 + len(by_stage)) * 8
        assert calls.keys() == {"all_reduce"}
        assert calls["all_reduce"].bytes == 4 * parameters + sums_of_the_step


@pytest.mark.parametrize("stage", range(4))
def test_reduced_communication_halves_the_gradients_in_every_stage(by_stage, stage):
    """And nothing else; stages 2 and 3 reduce after every micro-batch."""
    for rank in by_stage:
        full, parameters = rank[stage, "fp32"]
        half, _ = rank[stage, "bf16"]
        saved = sum(t.bytes for t in full.values()) - sum(t.bytes for t in half.values())
        assert saved == 2 * parameters * (MICRO_BATCHES if stage >= 2 else 1)
        others = full.keys() - {"all_reduce", "reduce_scatter"}
        assert {key: half[key] for key in others} == {key: full[key] for key in others}
