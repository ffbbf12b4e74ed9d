"""What the parts of a step cost on this machine: a block, a head, an update and the exchanges, tried on all ranks at once.

    python -m torch.distributed.run --nproc-per-node=N -m planner.calibration FOLDER

A calibration belongs to a processor, a release of torch and a number of ranks; nothing is kept of it.
"""

import contextlib
import os
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from console.command import CommandParser
from engine.attention_kernel import attends_by_products
from engine.optimizer import build_optimizer
from engine.run.plan import RunPlan
from launch.topology import LAUNCHER_VARIABLES, shell_environment
from model.attention import use_products
from model.documents import Documents
from model.llama import Block, layer_plan
from planner.coupled import coupled_blocks
from planner.engine_probe import EngineProbe
from planner.parts import elements, part_of_model
from planner.rates import Cost, Kind, MeasuredLinks, PartRates, Passes, fit
from planner.speed import exchanges_of_a_block
from training.data import TrainingData, make_batch, training_order

FEW_BLOCKS = 2
FEW_ELEMENTS = 8 * 2**20
"""Of the blocks that are tried in turn, and of an update, unless the model has fewer: more than a cache holds, since a training
does not find its weights there either."""
SIZES = (4 * 2**10, 512 * 2**10, 8 * 2**20)
"""Bytes of the exchanges that are tried."""
FEWEST_ROUNDS = 2
"""The first of which only warms up."""
COPIED_BYTES = 32 * 2**20
SHAPES = ((1.0, 1), (1.0, 8), (0.5, 1), (0.25, 1))
"""Of what a block is tried on beside the data's own rows: share of the tokens of a row, and documents into which it is cut."""
HALF = 3
"""The place of rows of half of the tokens, on which head and embedding are tried too."""
OWN = 4.0
"""What the data's own rows count where the others only say how times change with lengths."""


class Probes:
    """Parts of a plan's step, to be timed in rounds; DeepSpeed's own share for these `stages` of ZeRO.

    Collective over all ranks. To be made before the engine of a run, whose groups DeepSpeed then remembers.
    """

    def __init__(self, plan: RunPlan, device: torch.device, stages: tuple[int, ...] = (0, 1, 2, 3)) -> None:
        self.plan, self.mesh, self.device = plan, plan.mesh, device
        self.model = part_of_model(plan.recipe.model, plan.mesh)
        self._found: dict[str, list[float]] = {}
        self._dtype = torch.bfloat16 if plan.half_precision and not self._autocast else torch.float32
        layers = layer_plan(self.model)
        self._blocks: list[nn.Module] = []
        for layer in [layer for layer in layers if layer.cls is Block][::-1]:
            if len(self._blocks) < FEW_BLOCKS or sum(map(elements, self._blocks)) < FEW_ELEMENTS:
                self._blocks.append(self._built(layer))
        self._head, self._embedding = self._built(layers[-1], "weight"), self._built(layers[0])
        self._norm = self._built(layers[-2])
        self._shapes, self._whole_rows = self._block_shapes()
        self._groups = {n: self._group(n) for n in range(2, self.mesh.world_size + 1) if self.mesh.world_size % n == 0}
        self._coupled = coupled_blocks(plan, len(self._blocks), device, self._dtype)
        self._updated = self._optimizer()
        self._engines = EngineProbe(plan, device, stages)
        self._copied = torch.zeros(2, COPIED_BYTES // 4, device=self.device)
        self._tensors = {size: torch.zeros(size // 4, device=self.device) for size in SIZES}

    @property
    def _autocast(self) -> bool:
        return bool(self.plan.ds_config.get("torch_autocast", {}).get("enabled"))

    def _context(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16) if self._autocast else contextlib.nullcontext()

    def _built(self, layer: Any, tied: str = "") -> nn.Module:
        made = layer.build(0)
        if tied and getattr(made, tied) is None:  # of a head that is tied to the embedding
            made.weight = nn.Parameter(torch.zeros(self.model.vocab_size, self.model.hidden_size))
        if attends_by_products(self.plan.recipe, self.plan.ds_config, self.device.type):
            use_products(made)
        return made.to(self.device, self._dtype)

    def _group(self, ranks: int) -> dist.ProcessGroup | None:
        """Of neighbours, with this rank."""
        if ranks == self.mesh.world_size:
            return dist.group.WORLD
        groups = [dist.new_group([*range(first, first + ranks)]) for first in range(0, self.mesh.world_size, ranks)]
        return groups[self.mesh.rank // ranks]

    def _block_shapes(self) -> tuple[list[Documents], torch.Tensor]:
        """The run's first micro-batch as far as a rank has it, then rows of other lengths; positions of the first as a whole."""
        plan, stage = self.plan, self.plan.stages[0]
        rows, whole = stage.batch.micro_batch_samples, stage.seq_length // self.mesh.sequence
        order = training_order(stage.dataset, stage.config, plan.recipe.training.seed)
        sources, places = TrainingData(stage.dataset, order).places(np.arange(rows))
        positions = make_batch(stage.dataset, sources, places)["position_ids"]
        found = [positions[:, :whole]]
        for share, pieces in SHAPES:
            length = max(int(whole * share) // pieces, 1)
            found.append(torch.arange(length).repeat(pieces).expand(rows, -1))
        shapes = [Documents.from_position_ids(positions.contiguous(), self.device) for positions in found]
        if self.model.adapters.names:
            for documents in shapes:
                documents.route(torch.zeros(rows, dtype=torch.int64), 0)
        return shapes, positions

    def _optimizer(self) -> tuple[torch.optim.Optimizer, int]:
        """That of as many blocks as it takes, and how many elements they have."""
        blocks = nn.ModuleList()
        for layer in layer_plan(self.model):
            if layer.cls is Block and elements(blocks) < FEW_ELEMENTS:
                blocks.append(layer.build(0).to(self.device))
        optimizer = build_optimizer(blocks, self.plan.recipe.optimizer, {})
        for parameter in blocks.parameters():
            parameter.grad = torch.full_like(parameter, 1e-4) if parameter.requires_grad else None
        return optimizer, elements(blocks, trained=True)

    def round(self) -> None:
        """Everything once; the first round of all only warms up."""
        for name, seconds in self._round():
            self._found.setdefault(name, []).append(seconds)

    def _round(self) -> Iterator[tuple[str, float]]:
        stage = self.plan.stages[0]
        rows, width = stage.batch.micro_batch_samples, self.model.hidden_size
        for number, documents in enumerate(self._shapes):
            tokens = documents.position_ids.shape[1]
            x = torch.randn(rows, tokens, width, device=self.device, dtype=self._dtype)
            yield from self._passes(
                f"block {number}", partial(self._through_blocks, x, documents), x, len(self._blocks)
            )
        x = torch.randn(rows, self._shapes[0].position_ids.shape[1], width, device=self.device, dtype=self._dtype)
        if self.mesh.rank == 0:
            yield from self._passes("alone", partial(self._through_blocks, x, self._shapes[0]), x, len(self._blocks))
        else:
            yield "alone forward", 0.0 * self._timed(lambda: None)
            yield "alone backward", 0.0 * self._timed(lambda: None)
        if self._coupled:
            x, act = self._coupled.input_and_pass(self._whole_rows)
            yield from self._passes("coupled", act, x, len(self._blocks))
        for number in (0, HALF):
            documents = self._shapes[number]
            tokens = documents.position_ids.shape[1]
            x = torch.randn(rows, tokens, width, device=self.device, dtype=self._dtype)
            targets = torch.zeros(rows, tokens, dtype=torch.int64, device=self.device)
            ids = torch.randint(self.model.vocab_size, (rows, tokens), device=self.device)
            yield from self._passes(f"head {number}", partial(self._loss, x, documents, targets), x)
            yield from self._passes(f"embedding {number}", partial(self._embedding, ids))
        yield "update", self._timed(self._updated[0].step) / self._updated[1]
        for name, act in self._engines.probes():
            yield name, self._timed(act)
        yield "copy", self._timed(lambda: self._copied[0].copy_(self._copied[1]))
        for ranks, group in self._groups.items():
            for size, tensor in self._tensors.items():
                for kind, act in self._exchanges(ranks, group, tensor).items():
                    yield f"{kind} {ranks} {size}", self._timed(act)
        for size, tensor in self._tensors.items() if self.mesh.world_size > 1 else ():
            yield f"send 2 {size}", self._timed(partial(self._send, tensor))

    def _through_blocks(self, x: torch.Tensor, documents: Documents) -> torch.Tensor:
        for block in self._blocks:
            x = block(x, documents)
        return x

    def _loss(self, x: torch.Tensor, documents: Documents, targets: torch.Tensor) -> torch.Tensor:
        z_loss_weight = self.plan.recipe.training.z_loss_weight
        return self._head(self._norm(x, documents), documents, targets=targets, z_loss_weight=z_loss_weight)[0]

    def _passes(
        self, name: str, act: Callable[[], torch.Tensor], x: torch.Tensor | None = None, times: int = 1
    ) -> Iterator[tuple[str, float]]:
        """Forward, then backward into what was read and into the gradients that are there already."""
        out: list[torch.Tensor] = []
        if x is not None:
            x.requires_grad_()

        def forward() -> None:
            with self._context():
                out.append(act())

        yield f"{name} forward", self._timed(forward) / times
        seed = torch.ones_like(out[0])
        yield f"{name} backward", self._timed(lambda: out[0].backward(seed)) / times

    def _exchanges(self, ranks: int, group: Any, tensor: torch.Tensor) -> dict[Kind, Callable[[], Any]]:
        part = tensor[: len(tensor) // ranks]
        whole = tensor[: len(part) * ranks]
        found: dict[Kind, Callable[[], Any]] = {
            "all_reduce": lambda: dist.all_reduce(tensor, group=group),
            "all_gather": lambda: dist.all_gather_into_tensor(whole, part.clone(), group=group),
            "reduce_scatter": lambda: dist.reduce_scatter_tensor(part.clone(), whole, group=group),
            "all_to_all": lambda: dist.all_to_all_single(torch.empty_like(whole), whole, group=group),
        }
        return found

    def _send(self, tensor: torch.Tensor) -> None:
        """From every even rank to its neighbour."""
        other = self.mesh.rank ^ 1
        if other < self.mesh.world_size:
            (dist.send if self.mesh.rank < other else dist.recv)(tensor, other)

    def _timed(self, act: Callable[[], Any]) -> float:
        dist.barrier()
        self._wait()
        began = time.perf_counter()
        act()
        self._wait()
        return time.perf_counter() - began

    def all_agree(self, wish: bool) -> bool:
        """Whether the first rank wishes it too."""
        wished = torch.tensor([float(wish)], device=self.device)
        dist.broadcast(wished, 0)
        return bool(wished.item())

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def rates(self) -> PartRates:
        """From all rounds but the first: medians, then means over the ranks. Collective over all ranks."""
        names = sorted(self._found)
        found_here = [statistics.median(self._found[name][1:]) for name in names]
        medians = torch.tensor(found_here, dtype=torch.float64, device=self.device)
        dist.all_reduce(medians)
        found = dict(zip(names, (medians / self.mesh.world_size).tolist(), strict=True))
        passes = torch.tensor([self._found[name][1:] for name in names if name.startswith("block")], device=self.device)
        slowest = passes.clone()
        dist.all_reduce(passes)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        share = min(1.0, len(os.sched_getaffinity(0)) / self.mesh.world_size) if self.device.type == "cpu" else 1.0
        of_first = self.mesh.world_size * (found["alone forward"] + found["alone backward"])
        alone = share * (found["block 0 forward"] + found["block 0 backward"]) / of_first
        points: dict[str, list[tuple[float, float]]] = {}
        for name in names:
            words = name.split()
            if words[0] in get_args(Kind) and len(words) == 3:
                points.setdefault(f"{words[0]} {words[1]}", []).append((float(words[2]), found[name]))
        rates = PartRates(
            tensor=self.mesh.tensor,
            block=Passes(*(self._fitted("block", each, found) for each in ("forward", "backward"))),
            head=Passes(*(self._fitted("head", each, found) for each in ("forward", "backward"))),
            embedding=Passes(*(self._fitted("embedding", each, found) for each in ("forward", "backward"))),
            update=found["update"],
            copy_byte=found["copy"] / COPIED_BYTES,
            links=MeasuredLinks(points={name: sorted(pairs) for name, pairs in points.items()}),
            share=share,
            alone=max(alone, 1.0),
            engine=self._engines.costs(found),
            slowest=float((slowest * self.mesh.world_size / passes).median()),
            source=f"a calibration on {self.mesh.world_size} ranks of this machine",
        )
        if not self._coupled:
            return rates
        more = sum(found[f"coupled {way}"] - found[f"block 0 {way}"] for way in ("forward", "backward"))
        return rates.model_copy(update={"coupling": max(1.0, more / exchanges_of_a_block(self.plan, rates))})

    def _fitted(self, part: str, way: str, found: dict[str, float]) -> Cost:
        rows = self.plan.stages[0].batch.micro_batch_samples
        visibility = self.model.visibility
        features, seconds = [], []
        for number, documents in enumerate(self._shapes):
            tokens = documents.position_ids.shape[1]
            if (taken := found.get(f"{part} {number} {way}")) is None:
                continue
            pairs = sum(visibility.pairs(length) for length in documents.lengths)
            lengths = [float(pairs), float(len(documents.lengths))] if part == "block" else [0.0, 0.0]
            features.append([1.0, float(rows * tokens), *lengths])
            seconds.append(taken)
        return fit(features, seconds, [OWN] + [1.0] * (len(seconds) - 1))


def calibrate(plans: Sequence[RunPlan], seconds: float = 30.0) -> dict[int, PartRates]:
    """The rates of a model on this machine by tensor-parallel degree, tried on as many ranks as the plans have.

    The plans, one a degree, differ in their layouts only. `seconds`: for all of them, after the ranks have started. Raises
    ValueError where a rank fails.
    """
    ranks = plans[0].mesh.world_size
    with tempfile.TemporaryDirectory(prefix="calibration-") as folder:
        (Path(folder) / "plans").write_bytes(pickle.dumps((list(plans), seconds)))
        launcher = [
            "torch.distributed.run",
            "--standalone",
            "--local-addr=127.0.0.1",
            f"--nproc-per-node={ranks}",
            "-m",
        ]
        command = [sys.executable, "-m", *launcher, "planner.calibration", folder]
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        environment = {"OMP_NUM_THREADS": str(threads)} | shell_environment()
        environment = {name: value for name, value in environment.items() if name not in LAUNCHER_VARIABLES}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            said = re.findall(r"^(?:error: |[\w.]*Error\b:? ?).*", done.stderr, re.MULTILINE)
            raise ValueError(f"the calibration ended with exit code {done.returncode}: {[*said, 'no word'][0]}")
        texts = [(Path(folder) / f"rates-{plan.mesh.tensor}.json").read_text() for plan in plans]
    return {rates.tensor: rates for rates in map(PartRates.model_validate_json, texts)}


def main(folder: Path) -> int:
    from engine.process_group import start_process_group
    from launch.topology import read_topology

    topology = read_topology()
    start_process_group(topology)
    plans, seconds = pickle.loads((folder / "plans").read_bytes())
    for plan in plans:
        probes = Probes(plan._replace(mesh=plan.mesh._replace(rank=topology.rank)), topology.device)
        began, rounds = time.monotonic(), 0
        while rounds < FEWEST_ROUNDS or probes.all_agree(time.monotonic() - began < seconds / len(plans)):
            probes.round()
            rounds += 1
        rates = probes.rates()
        if topology.is_first:
            (folder / f"rates-{plan.mesh.tensor}.json").write_text(rates.model_dump_json())
    return 0


if __name__ == "__main__":
    parser = CommandParser(prog="python -m planner.calibration", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of the job")
    given = parser.parse_args()

    from launch.rank import run_rank

    run_rank(lambda: main(given.folder))
