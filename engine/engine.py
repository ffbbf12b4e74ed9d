"""What trains: a DeepSpeed engine and, as fields beside it, all that is ours."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed import comm as dist
from torch import Tensor, nn

from engine import internals
from engine.gate import Gate, Judge
from engine.layout.deal import columns_here
from engine.layout.mesh import Mesh
from engine.layout.pipeline import KnownDocuments, QueuedLoss
from engine.reduction.compression import CompressedReduction
from model.config import ModelConfig
from model.documents import Documents
from model.head_loss import HeadLoss
from model.visibility import Visibility
from training.batch import Batch
from training.learned_prior import LearnedPrior


class Engine:
    """A model in a layout without a pipeline. What takes batches or sums up is collective over all ranks."""

    pipeline_bounds: tuple[int, ...] = ()
    """Where the layer plan is divided into pipeline ranks."""

    def __init__(
        self, deepspeed: DeepSpeedEngine, mesh: Mesh, config: ModelConfig, reduction: CompressedReduction | None
    ) -> None:
        self.deepspeed, self.mesh, self.config = deepspeed, mesh, config
        self.reduction = reduction
        """Of the gradients, where it is compressed; None where DeepSpeed reduces."""
        self.base: str | None = None
        """Digest of the given weights that are not trained; None where all are, or they follow from the recipe's seed."""
        self.prior: LearnedPrior | None = None
        """Of a mixture whose prior is learned."""
        self.gate = Gate(self.base_optimizer, lambda: float(self.optimizer._global_grad_norm), reduction)
        self._found = torch.zeros(0)
        self._totals: list[float] | None = None
        if self.zero_stage in (1, 2):
            internals.leave_out_module_weights(deepspeed)

    @property
    def visibility(self) -> Visibility:
        return self.config.visibility

    @property
    def module(self) -> nn.Module:
        return self.deepspeed.module

    @property
    def head_loss(self) -> HeadLoss:
        head: Any = self.module.lm_head
        return head.loss

    @property
    def wire_bytes(self) -> int | None:
        """What this rank handed to the calls of a compressed reduction; None where DeepSpeed reduces."""
        return self.reduction.wire_bytes if self.reduction else None

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's wrapper, or the base optimizer where it has none."""
        return self.deepspeed.optimizer

    @property
    def base_optimizer(self) -> torch.optim.Optimizer:
        return self.deepspeed.basic_optimizer

    @property
    def device(self) -> torch.device:
        return self.deepspeed.device

    @property
    def zero_stage(self) -> int:
        return int(self.deepspeed.zero_optimization_stage())

    def fit(self, shape: tuple[int, ...], micro_batches: int) -> None:
        """Prepare for a step of so many micro-batches of [B, T], where a new stage divides it otherwise."""
        rows, engine = shape[0], self.deepspeed
        if (rows, micro_batches) != (engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()):
            engine.set_train_micro_batch_size(rows)
            engine.set_train_batch_size(math.prod((rows, micro_batches, engine.dp_world_size)))
            internals.restart_accumulation(engine)

    def update(self, micro_batches: list[Batch], z_loss_weight: float, weight: float) -> Tensor:
        """Forward, backward and update of a step. Returns this rank's sums [objective, *sums of `HeadLoss`], in float64.

        `weight`: of the objective's sum in the loss that DeepSpeed averages.
        """
        self._found = torch.zeros(1 + self.head_loss.num_sums, dtype=torch.float64, device=self.device)
        for batch in micro_batches:
            objective_sum, loss_sums = self.forward(batch, z_loss_weight)
            self._found += torch.cat([objective_sum.detach()[None], loss_sums])
            self.deepspeed.backward(objective_sum * weight)
            self.deepspeed.step()
        return self._found

    @property
    def found(self) -> Tensor:
        """What `update` is about to return, by the micro-batches so far."""
        return self._found

    def judge_by(self, judge: Judge | None, targets: int) -> None:
        """Let `judge` refuse the next step, which has so many targets over all ranks, or nobody."""
        self._totals = None

        def judged(norm: float) -> bool:
            self._totals = self.sum_over_tokens(self.found.tolist())
            assert judge
            return judge(self._totals[1] / targets, norm)

        self.gate.expect(judge and judged)

    def totals(self, found: Tensor) -> list[float]:
        """Over all ranks, of what `update` has returned: summed here, unless the judge had to know them before."""
        return self._totals or self.sum_over_tokens(found.tolist())

    def sums(self, batches: list[Batch]) -> list[Tensor]:
        """Those of `HeadLoss` for each of some batches of one shape, without gradients."""
        self.deepspeed.eval()
        with torch.no_grad():
            sums = [self.forward(batch, 0.0)[1] for batch in batches]
        self.deepspeed.train()
        return sums

    def choose(self, batches: list[Batch]) -> list[Batch]:
        """The batches with the adapter of each token, that under which its document is most likely."""
        chosen, whole = [], [batch.copy() for batch in batches]
        for batch in whole:
            batch.pop("seeds", None)  # nothing is dropped here
        for batch, places in zip(batches, self.best_adapters(whole), strict=True):
            lengths = torch.tensor(documents_of(batch).lengths)
            adapters = places.repeat_interleave(lengths).view(batch["position_ids"].shape)
            chosen.append(batch | {"adapters": adapters})
        return chosen

    def best_adapters(self, batches: list[Batch]) -> list[Tensor]:
        """int64 [documents] of each batch."""
        return [sums[1 + len(self.config.adapters.names) :].long().cpu() for sums in self.sums(batches)]

    def forward(self, batch: Batch, z_loss_weight: float) -> tuple[Tensor, Tensor]:
        """Objective and `reported_sums` over this rank's tokens of one micro-batch."""
        columns = self.columns(batch)
        here = _part(batch, columns)
        ids, targets = (here[key].to(self.device, non_blocking=True) for key in ("input_ids", "targets"))
        of_rows = {
            key: here[key].to(self.device, non_blocking=True)
            for key in ("target_weights", "adapters", "sources", "seeds")
            if key in here
        }
        return self.deepspeed(
            input_ids=ids,
            position_ids=here["position_ids"],
            targets=targets,
            z_loss_weight=z_loss_weight,
            columns=columns,
            copies=here.get("copies", 1),
            **of_rows,
        )

    def columns(self, batch: Batch) -> slice | Tensor:
        """Which tokens of the rows of a micro-batch this rank works on."""
        if self.mesh.sequence == 1:
            return slice(None)
        return columns_here(documents_of(batch), self.visibility, self.mesh)

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        """Element by element, in float64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def sum_over_tokens(self, values: list[float]) -> list[float]:
        """Over all ranks, each token counted once where several ranks compute the same."""
        return self.sum_over_ranks(values if self.mesh.counts else [0.0] * len(values))

    def close(self) -> None:
        """Let go of the process groups and of what DeepSpeed remembers, so that the process may build another engine.

        An idle gloo group costs two threads that wake a hundred times a second.
        """
        self.deepspeed.destroy()
        internals.forget_engine()
        dist.barrier()  # a rank that still receives would lose its peer
        for group in internals.process_groups():
            dist.destroy_process_group(group)


class PipelineEngine(Engine):
    """Consecutive layers of the model on different ranks, which DeepSpeed's schedule drives."""

    def __init__(
        self,
        deepspeed: DeepSpeedEngine,
        mesh: Mesh,
        config: ModelConfig,
        reduction: CompressedReduction | None,
        loss: QueuedLoss,
        bounds: list[int],
    ) -> None:
        super().__init__(deepspeed, mesh, config, reduction)
        self.loss, self.pipeline_bounds = loss, tuple(bounds)
        self.known: KnownDocuments = deepspeed.module.known
        self._shape: tuple[int, ...] | None = None

    @property
    def head_loss(self) -> HeadLoss:
        return self.loss.of_head

    def fit(self, shape: tuple[int, ...], micro_batches: int) -> None:
        super().fit(shape, micro_batches)
        if self._shape not in (None, shape):  # the ranks exchange the shapes of activations anew
            self.deepspeed.reset_activation_shape()
        self._shape = shape
        internals.set_micro_batch_size(self.deepspeed, shape[0])

    def update(self, micro_batches: list[Batch], z_loss_weight: float, weight: float) -> Tensor:
        """As in `Engine`; zeros on all ranks but the last of the pipeline."""
        here = [_part(batch, self.columns(batch)) for batch in micro_batches]
        self.loss.start(here, z_loss_weight, weight)
        self.known.start(here)
        self.deepspeed.train_batch(_items(here))
        return self.found

    @property
    def found(self) -> Tensor:
        """As in `Engine`; zeros on all ranks but the last of the pipeline."""
        nothing = torch.zeros(1 + self.head_loss.num_sums, dtype=torch.float64)
        return torch.stack(self.loss.found).sum(0) if self.loss.found else nothing

    def sums(self, batches: list[Batch]) -> list[Tensor]:
        """As in `Engine`; zeros on all ranks but the last of the pipeline."""
        here = [_part(batch, self.columns(batch)) for batch in batches]
        self.loss.start(here)
        self.known.start(here)
        self.deepspeed.reset_activation_shape()  # rows may have another length here than in training
        self.deepspeed.eval_batch(_items(here), reduce_output=None, bcast_loss=False, num_micro_batches=len(here))
        self.deepspeed.reset_activation_shape()
        nothing = torch.zeros(self.head_loss.num_sums, dtype=torch.float64)
        return [found[1:] for found in self.loss.found] or [nothing] * len(batches)

    def best_adapters(self, batches: list[Batch]) -> list[Tensor]:
        sizes = [len(documents_of(batch).lengths) for batch in batches]
        found, grid = super().best_adapters(batches), self.deepspeed.grid
        places = torch.cat(found) if self.loss.found else torch.zeros(sum(sizes), dtype=torch.int64)
        places = places.to(self.device)
        dist.broadcast(places, grid.stage_to_global(self.mesh.pipeline - 1), grid.get_pipe_parallel_group())
        return list(places.cpu().split(sizes))


def documents_of(batch: Batch) -> Documents:
    """The documents of whole rows."""
    return Documents.from_position_ids(batch["position_ids"], copies=batch.get("copies", 1))


def _part(batch: Batch, columns: slice | Tensor) -> Batch:
    """Some columns of the rows; the positions stay whole, since attention needs all documents."""
    here = batch | {"input_ids": batch["input_ids"][:, columns], "targets": batch["targets"][:, columns]}
    if "target_weights" in batch:
        here["target_weights"] = batch["target_weights"][:, columns]
    if "adapters" in batch and batch["adapters"].dim() == 2:
        here["adapters"] = batch["adapters"][:, columns]
    return here


def _items(batches: list[Batch]) -> Iterator[tuple]:
    """What DeepSpeed pulls on the first and the last rank: inputs, and labels, which are none here (see `QueuedLoss`)."""
    return (((batch["input_ids"], batch["position_ids"]), ()) for batch in batches)
