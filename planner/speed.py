"""How long an optimizer step takes in a layout: its parts by their rates, in the order in which the layout does them.

Computation is counted from the documents in the rows of the first steps (`planner.lengths`); what DeepSpeed sends, from
which stage of ZeRO it is. Where nothing overlaps, as with gloo, the parts add up. A pipeline is played through by the
instructions of DeepSpeed's own schedule (`planner.schedule`).

Legend: B rows of a micro-batch, T tokens of a row, D model, V vocabulary, n ranks with the same parameters.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from engine.layout.schedule import instructions
from engine.run.memory import has_half_weights
from engine.run.plan import RunPlan
from planner.lengths import StepRows, rows_of_steps
from planner.parts import StageParts, stage_parts
from planner.rates import EngineCost, PartRates, Passes
from planner.schedule import play

AGREEMENTS = 8
"""Sums of a few numbers over all ranks in a step: targets, losses, norm, overflow, whether to stop."""
MOST_PLAYED = 4096
"""Micro-batches times stages of the steps of a pipeline that are played."""


class Seconds(dict[str, float]):
    """By part of a step."""

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds({name: self.get(name, 0.0) + other.get(name, 0.0) for name in {**self, **other}})

    @property
    def total(self) -> float:
        return sum(self.values())


class StepTime(NamedTuple):
    seconds: float
    """Mean of the steps that were looked at."""
    parts: dict[str, float]
    """Seconds of the rank that ends last, without what is hidden behind others: `blocks` (but for attention), `attention`,
    `recomputation`, `embedding`, `head`, `tensor`, `sequence`, `gradients`, `parameters`, `optimizer`, `pipeline` (sends),
    `bubble` (waits for other stages), `agreement`, `engine` (what DeepSpeed takes itself)."""
    tokens_per_second: float
    """Over all ranks."""


def step_time(plan: RunPlan, rates: PartRates, rows: StepRows | None = None) -> StepTime:
    """Of the first stage's steps. `rows`: what `rows_of_steps` says of it, where several layouts are asked about."""
    assert rates.tensor == plan.mesh.tensor, "rates are those of a tensor-parallel degree"
    rows = rows or rows_of_steps(plan, plan.stages[0])
    step = _Step(plan, rates)
    found = [step.slowest(pairs, documents) for pairs, documents in zip(rows.pairs, rows.documents, strict=True)]
    played = max(1, min(len(found), MOST_PLAYED // (step.micro_batches * plan.mesh.pipeline)))
    times = [step.played(*each) if plan.mesh.pipeline > 1 else step.alone(*each) for each in found[:played]]
    parts = sum(times, Seconds())
    mean = {name: float(seconds) / len(times) for name, seconds in parts.items()}
    total = sum(mean.values())
    return StepTime(total, mean, plan.step_tokens / total)


def exchanges_of_a_block(plan: RunPlan, rates: PartRates) -> float:
    """Seconds of one block's exchanges for a micro-batch, forward and backward, by themselves."""
    step = _Step(plan, rates)
    return step.tensor("forward") + step.tensor("backward") + 2 * step.sequence()


class _Step:
    """One step of a layout."""

    def __init__(self, plan: RunPlan, rates: PartRates) -> None:
        self.plan, self.rates, self.mesh = plan, rates, plan.mesh
        self.model, self.zero = plan.recipe.model, plan.ds_config.get("zero_optimization", {})
        self.zero_stage: int = self.zero.get("stage", 0)
        self.stages = stage_parts(plan)
        self.micro_batches = plan.batch.accumulation
        self.replicas = self.mesh.data * self.mesh.sequence
        copies = plan.recipe.objective.copies
        self.rows = plan.batch.micro_batch_samples * plan.stages[0].seq_length
        self.head_tokens = self.rows // self.mesh.sequence
        self.tokens = copies * self.head_tokens
        inside = self.mesh.tensor > 1 or self.mesh.sequence > 1
        self.coupling = (rates.coupling or 1.0) if inside else 1.0
        waits = self.zero_stage == 3 or (inside and rates.coupling is None)
        self.lag = rates.slowest if waits else 1.0
        self.engine = rates.engine.get(self.zero_stage, EngineCost())
        self.half = has_half_weights(plan)
        self.width = 2 if plan.half_precision else 4
        """Bytes of an activation."""
        self.weight = 2 if self.half else 4
        """Bytes of a weight that is computed with."""
        maps = (
            2 * self.model.hidden_size * (self.model.num_attention_heads + self.model.kv_heads) * self.model.head_width
        )
        down = self.model.hidden_size * self.model.intermediate_size
        self.again = 1 - down / (3 * down + maps)
        """Share of a block's forward pass that makes its activations again: torch ends before the last map, whose result no
        gradient needs."""

    def slowest(self, pairs: np.ndarray, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pairs and documents of each micro-batch [accumulation] of a step on the ranks that decide how long it takes.

        At ZeRO-3 the ranks wait for each other in every micro-batch, else once a step.
        """
        if self.zero_stage == 3:
            return pairs.max(0), documents.max(0)
        slowest = pairs.sum(-1).argmax()
        return pairs[slowest], documents[slowest]

    def alone(self, pairs: np.ndarray, documents: np.ndarray) -> Seconds:
        """Without a pipeline: by part."""
        (stage,) = self.stages
        total = self.end(stage)
        for micro in range(self.micro_batches):
            forward, backward = self.passes(stage, pairs[micro], documents[micro])
            each = self.gathered(stage) + self.reduced(stage, micro)
            each["engine"] = stage.tensors * self.engine.micro
            if self.rates.overlap and self.zero.get("overlap_comm", self.zero_stage > 0):
                each = _exposed(each, {"parameters": forward + backward, "gradients": backward})
            total += forward + backward + each
        return total

    def played(self, pairs: np.ndarray, documents: np.ndarray) -> Seconds:
        """With a pipeline: by part of the stage that has most to compute."""
        share = self.rates.share
        passes: dict[tuple[int, int], tuple[Seconds, Seconds]] = {}
        for number, stage in enumerate(self.stages):
            for micro in range(self.micro_batches):
                passes[number, micro] = self.passes(stage, pairs[micro], documents[micro])

        def work(stage: int, name: str, micro: int) -> float:
            return passes[stage, micro][name == "BackwardPass"].total * share

        result = play(
            instructions(self.mesh.pipeline, self.micro_batches),
            work,
            self.sent,
            share * self.mesh.pipeline,
            self.rates.alone,
        )
        busiest = int(np.argmax(result.computed))
        own = Seconds()
        for micro in range(self.micro_batches):
            own += passes[busiest, micro][0] + passes[busiest, micro][1]
        scale = result.computed[busiest] / (own.total or 1.0)
        total = Seconds({name: seconds * scale for name, seconds in own.items()})
        total["pipeline"] = result.exchanged[busiest]
        total["bubble"] = result.end - result.computed[busiest] - result.exchanged[busiest]
        last = self.micro_batches - 1
        ends = [self.end(stage) + self.reduced(stage, last) for stage in self.stages]
        if self.model.tie_word_embeddings:
            table = 4 * self.model.vocab_size * self.model.hidden_size / self.mesh.tensor
            total["pipeline"] += 2 * self.exchange("send", 2, self.mesh.world_size // self.mesh.pipeline, table)
        return total + max(ends, key=lambda end: end.total)

    def passes(self, stage: StageParts, pairs: float, documents: float) -> tuple[Seconds, Seconds]:
        """Forward and backward pass of a micro-batch, recomputation and exchanges of activations included."""
        pairs = pairs / self.mesh.sequence
        forward, backward = Seconds(), Seconds()
        for way, total in (("forward", forward), ("backward", backward)):
            cost = getattr(self.rates.block, way)
            total["attention"] = stage.blocks * self.lag * cost.attention(pairs, documents)
            total["blocks"] = stage.blocks * self.lag * cost.seconds(self.tokens)
            total["embedding"] = stage.embedding * self._once(self.rates.embedding, way, self.tokens)
            total["head"] = stage.head * self._once(self.rates.head, way, self.head_tokens)
            total["tensor"] = self.coupling * (stage.blocks * self.tensor(way) + self.tensor_ends(stage, way))
            total["sequence"] = self.coupling * stage.blocks * self.sequence()
        cost = self.rates.block.forward
        again = self.lag * (cost.attention(pairs, documents) + self.again * cost.seconds(self.tokens))
        again += self.coupling * (self.tensor("forward", recomputed=True) + self.sequence())
        backward["recomputation"] = stage.recomputed * again
        return forward, backward

    def _once(self, passes: Passes, way: str, tokens: int) -> float:
        return getattr(passes, way).seconds(tokens)

    def exchange(self, kind: Any, ranks: int, stride: int, size: float) -> float:
        return self.rates.links.seconds(kind, ranks, stride, size) if ranks > 1 else 0.0

    def between_replicas(self, kind: Any, size: float) -> float:
        """Where DeepSpeed's own share was measured, that has what an exchange takes however little it moves."""
        least = self.exchange(kind, self.replicas, self.mesh.tensor, 0.0) if self.rates.engine else 0.0
        return self.exchange(kind, self.replicas, self.mesh.tensor, size) - least

    def tensor(self, way: str, recomputed: bool = False) -> float:
        """Exchanges of a tensor-parallel group for one block; one less where only its activations are made again."""
        n, size = self.mesh.tensor, self.tokens * self.model.hidden_size * self.width
        if not self.mesh.split_rows:
            return (2 - recomputed) * self.exchange("all_reduce", n, 1, size)
        gather, scatter = (self.exchange(kind, n, 1, size) for kind in ("all_gather", "reduce_scatter"))
        return 2 * gather + (2 - recomputed) * scatter if way == "forward" else 2 * (2 * gather + scatter)

    def tensor_ends(self, stage: StageParts, way: str) -> float:
        """The same for embedding and head: the vectors of all ranks add up, and so do the gradients of what the head reads."""
        n, size = self.mesh.tensor, self.tokens * self.model.hidden_size * self.width
        kinds = {"forward": ("all_reduce", ""), "backward": ("", "all_reduce")}
        if self.mesh.split_rows:
            kinds = {"forward": ("reduce_scatter", "all_gather"), "backward": ("all_gather", "reduce_scatter")}
        pairs = zip(kinds[way], (stage.embedding, stage.head), strict=True)
        return sum(self.exchange(kind, n, 1, size) for kind, here in pairs if kind and here)

    def sequence(self) -> float:
        """Exchanges of a sequence group for one block, one way: q, k, v and what attention gives, or keys and values."""
        n, stride = self.mesh.sequence, self.mesh.tensor
        if n == 1:
            return 0.0
        heads, kv = self.model.num_attention_heads // stride, max(self.model.kv_heads // stride, 1)
        size = self.tokens * self.model.head_width * self.width
        if self.mesh.exchange == "keys":
            return self.exchange("all_to_all", n, stride, 2 * kv * size)  # at most: all keys, to one other rank each
        wide, narrow = (
            self.exchange("all_to_all", n, stride, number * size) + 2 * self.rates.copy_byte * number * size
            for number in (heads, max(kv, n))
        )
        return 2 * wide + 2 * narrow

    def sent(self, name: str) -> float:
        """A message between neighbours of a pipeline: activations with positions, or gradients."""
        size = self.tokens * self.model.hidden_size * self.width / (self.mesh.tensor if self.mesh.split_rows else 1)
        stride = self.mesh.world_size // self.mesh.pipeline
        positions = self.exchange("send", 2, stride, 8 * self.rows) if name == "SendActivation" else 0.0
        return self.exchange("send", 2, stride, size) + positions

    def gathered(self, stage: StageParts) -> Seconds:
        """ZeRO-3's parameters for a micro-batch: once where they may stay until the backward pass, else twice."""
        if self.zero_stage != 3 or self.replicas == 1:
            return Seconds()
        limits = ("stage3_max_live_parameters", "stage3_max_reuse_distance")
        stays = stage.elements <= min(self.zero.get(limit, 1e9) for limit in limits)
        size = stage.elements * self.weight / stage.tensors
        each = self.between_replicas("all_gather", size)
        return Seconds(parameters=(1 if stays else 2) * stage.tensors * each)

    def reduced(self, stage: StageParts, micro: int) -> Seconds:
        """Gradients, where they are summed over the replicas: after every micro-batch from ZeRO-2 on, else after the last."""
        last = micro == self.micro_batches - 1
        if not stage.trained or (self.zero_stage < 2 and not last):
            return Seconds()
        narrow = self.plan.ds_config.get("communication_data_type")
        width = (4 if narrow == "fp32" else 2) if narrow else self.weight
        bucket = stage.trained if self.zero_stage == 0 else min(self.zero.get("reduce_bucket_size", 5e8), stage.trained)
        calls = math.ceil(stage.trained / bucket)
        kind = "reduce_scatter" if self.zero_stage == 3 else "all_reduce"
        exchanged = calls * self.between_replicas(kind, stage.trained / calls * width)
        copied = 2 * stage.trained * width * self.rates.copy_byte if self.zero_stage or self.replicas > 1 else 0.0
        moved = 0.0
        if self._offloads("offload_optimizer"):
            moved = stage.trained / self.replicas * 4 * self.rates.offload_byte
        return Seconds(gradients=exchanged + copied + moved)

    def _offloads(self, key: str) -> bool:
        return (self.zero.get(key) or {}).get("device", "none") != "none"

    def end(self, stage: StageParts) -> Seconds:
        """After the gradients: norm, update, and the new weights to those who need them."""
        rates, own = self.rates, stage.trained / (self.replicas if self.zero_stage else 1)
        update, moved = rates.update, 0.0
        if self._offloads("offload_optimizer"):
            update, moved = rates.offloaded_update or update, own * self.weight * rates.offload_byte
        parameters = 0.0
        if self.zero_stage in (1, 2):
            parameters = self.between_replicas("all_gather", stage.trained * self.weight)
        agreement = AGREEMENTS * self.exchange("all_reduce", self.mesh.world_size, 1, 64)
        engine = stage.tensors * self.engine.step
        return Seconds(optimizer=own * update, parameters=parameters + moved, agreement=agreement, engine=engine)


def _exposed(exchanges: Seconds, behind: dict[str, Seconds]) -> Seconds:
    """What is left of exchanges that go on beside computation."""
    left = Seconds()
    for name, seconds in exchanges.items():
        left[name] = max(0.0, seconds - behind.get(name, Seconds()).total)
    return left
