"""What the parts of a step cost on a device: measured by `planner.calibration`, or derived from what a data sheet says.

Legend: H query heads, K key/value heads, d head width, n ranks of a group.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from engine.run.plan import RunPlan
from model.llama import Block, layer_plan
from planner.hardware import Hardware
from planner.parts import elements

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]

MATRIX_EFFICIENCY = {768: 0.42, 2048: 0.55, 4096: 0.61}
"""Of the peak in dense bf16 products, by `hidden_size`: the MFU of compiled training steps of 125M, 1B and 8B at rows of 4,096 on
an H200 (bench/README.md, `make bench-gpu`); all that is no product is in it. Between them by the logarithm."""
BANDWIDTH_EFFICIENCY = 0.8
"""Of the peak of memory and of links between devices: assumed, not measured here."""
PCIE_BANDWIDTH = 25e9
"""Bytes a second to and from the host's memory, where something is offloaded: PCIe 4.0 x16, assumed."""
HOST_BANDWIDTH = 200e9
"""Of a node's memory, for an optimizer that works there, shared by its devices: assumed."""
UPDATE_BYTES = 42
"""Memory traffic for each element of AdamW in float32: gradient read for norm, clipping (read and written) and update, weight and
two moments read and written, and the half-precision weight written."""


class Cost(NamedTuple):
    """Seconds of a pass, as a sum over what is in it."""

    call: float = 0.0
    token: float = 0.0
    pair: float = 0.0
    """Each visible (query, key) pair, of all heads that are here together."""
    document: float = 0.0

    def seconds(self, tokens: float, pairs: float = 0.0, documents: float = 0.0) -> float:
        return self.call + tokens * self.token + pairs * self.pair + documents * self.document

    def attention(self, pairs: float, documents: float) -> float:
        """The part that depends on the lengths of the documents."""
        return pairs * self.pair + documents * self.document


class Passes(NamedTuple):
    forward: Cost
    backward: Cost


class EngineCost(NamedTuple):
    """Seconds that DeepSpeed takes itself, for each tensor of parameters."""

    micro: float = 0.0
    """Of a micro-batch: hooks, and what a gather or a reduction takes however little it moves."""
    step: float = 0.0
    """Of a step, once."""


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class MeasuredLinks(Frozen):
    """Between the ranks of one host."""

    points: dict[str, list[tuple[float, float]]]
    """By "kind n": (bytes, seconds), ascending; bytes of the whole tensor for gather and scatter, else of what is handed in."""

    def seconds(self, kind: Kind, ranks: int, stride: int, size: float) -> float:
        points = self.points.get(f"{kind} {ranks}")
        if points is None:
            raise ValueError(
                f"the calibration has no {kind} between {ranks} ranks: calibrate with as many as the plan has"
            )
        sizes = [point[0] for point in points]
        at = min(max(bisect_left(sizes, size), 1), len(points) - 1)
        (x0, y0), (x1, y1) = points[at - 1 : at + 1]
        slope = max((y1 - y0) / (x1 - x0), 0.0)
        return max(y0 + (size - x0) * slope, min(y for _, y in points) if size < sizes[0] else 0.0)


class DerivedLinks(Frozen):
    """By latency and bandwidth, inside a node and between nodes."""

    node: int
    inside: tuple[float, float]
    """Latency in seconds, bytes a second."""
    between: tuple[float, float]

    def seconds(self, kind: Kind, ranks: int, stride: int, size: float) -> float:
        """Bandwidth-optimal collectives whose latency grows with the logarithm of the ranks."""
        latency, bandwidth = self.inside if ranks * stride <= self.node else self.between
        shares = {"all_reduce": 2 * (ranks - 1) / ranks, "send": 1.0}
        sent = size * shares.get(kind, (ranks - 1) / ranks)
        return latency * max(1, math.ceil(math.log2(ranks))) + sent / bandwidth


class PartRates(Frozen):
    """Of one rank's part of a model, with a tensor-parallel degree and a precision."""

    tensor: int
    block: Passes
    head: Passes
    """The last norm and the loss too."""
    embedding: Passes
    update: float
    """Seconds for each element that a rank's optimizer has: norm, clipping and update."""
    copy_byte: float
    """Seconds to copy a byte in memory."""
    offload_byte: float = 0.0
    """Seconds for each byte between device and host; 0 where they are one."""
    offloaded_update: float | None = None
    """As `update`, on the host; None: the same."""
    links: MeasuredLinks | DerivedLinks
    share: float = 1.0
    """Of a core that a rank had while this was measured, where ranks are more than cores."""
    alone: float = 1.0
    """How many times as fast a rank computes while the others wait."""
    engine: dict[int, EngineCost] = {}
    """By stage of ZeRO, where it was measured."""
    slowest: float = 1.0
    """How much longer than on average the slowest of the ranks takes for a pass, which all wait for where they exchange in it."""
    coupling: float | None = None
    """How many times as long as alone exchanges inside of blocks take, with the wait for the slowest; None: not measured."""
    overlap: bool = False
    """Whether gradients are reduced, and parameters gathered, beside the computation."""
    source: str


def fit(features: Sequence[Sequence[float]], seconds: Sequence[float], weights: Sequence[float]) -> Cost:
    """Coefficients that are not negative, by least squares of the relative errors; one that would be is left out."""
    matrix = np.array(features) / np.array(seconds)[:, None] * np.array(weights)[:, None]
    used = [place for place in range(len(Cost._fields)) if matrix[:, place].any()]
    while True:
        scale = matrix[:, used].max(0)
        solution = np.linalg.lstsq(matrix[:, used] / scale, np.array(weights), rcond=None)[0]
        if (solution >= 0).all():
            break
        del used[int(solution.argmin())]
    coefficients = dict.fromkeys(range(len(Cost._fields)), 0.0) | dict(
        zip(used, (solution / scale).tolist(), strict=True)
    )
    return Cost(*coefficients.values())


def derived_rates(plan: RunPlan, hardware: Hardware) -> PartRates:
    """What this model is expected to reach there. Raises ValueError where the data sheet leaves something open."""
    device = hardware.device
    missing = [
        name
        for name, value in (
            ("device.bf16_flops", device.bf16_flops),
            ("device.memory_bandwidth", device.memory_bandwidth),
            ("inside_bandwidth", hardware.inside_bandwidth or hardware.devices == 1),
            ("between_bandwidth", hardware.between_bandwidth or hardware.devices <= hardware.devices_per_node),
        )
        if not value
    ]
    if missing:
        raise ValueError(f"{hardware.device.name}: {' and '.join(missing)} must be known to say how long a step takes")
    assert device.bf16_flops
    assert device.memory_bandwidth
    model, tensor = plan.recipe.model, plan.mesh.tensor
    with torch.device("meta"):
        of_block = elements(next(layer for layer in layer_plan(model) if layer.cls is Block).build(0))
    # float32 products run in TF32 at half of the rate of bf16
    efficiency = matrix_efficiency(model.hidden_size)
    rate = device.bf16_flops * efficiency * (1.0 if plan.half_precision else 0.5)
    pair = 4.0 * model.num_attention_heads * model.head_width / tensor / rate
    token = 2.0 * of_block / tensor / rate
    head = 2.0 * model.vocab_size * model.hidden_size / tensor / rate
    backward = 1 if model.adapters.freeze_base else 2  # passes: without gradients of frozen weights
    memory = device.memory_bandwidth * BANDWIDTH_EFFICIENCY
    width = 2 * model.hidden_size / memory
    ranks_of_node = min(hardware.devices_per_node, hardware.devices)
    links = [
        (latency, (bandwidth or 1.0) * BANDWIDTH_EFFICIENCY)
        for latency, bandwidth in (
            (hardware.inside_latency, hardware.inside_bandwidth),
            (hardware.between_latency, hardware.between_bandwidth),
        )
    ]
    return PartRates(
        tensor=tensor,
        block=Passes(Cost(token=token, pair=pair), Cost(token=backward * token, pair=2 * pair)),
        head=Passes(Cost(token=head), Cost(token=backward * head)),
        embedding=Passes(Cost(token=2 * width), Cost(token=3 * width)),
        update=UPDATE_BYTES / memory,
        copy_byte=2 / memory,
        offload_byte=1 / PCIE_BANDWIDTH,
        offloaded_update=UPDATE_BYTES * ranks_of_node / HOST_BANDWIDTH,
        links=DerivedLinks(node=hardware.devices_per_node, inside=links[0], between=links[1]),
        overlap=True,
        source=f"{hardware.device.name} ({hardware.source}), matrix products at {efficiency:.0%} of the peak as bench/README.md "
        f"measured on an H200, memory and links at {BANDWIDTH_EFFICIENCY:.0%} of theirs",
    )


def matrix_efficiency(hidden_size: int) -> float:
    """By `MATRIX_EFFICIENCY`."""
    sizes = sorted(MATRIX_EFFICIENCY)
    at = min(max(bisect_left(sizes, hidden_size), 1), len(sizes) - 1)
    low, high = sizes[at - 1 : at + 1]
    share = min(max(math.log(hidden_size / low) / math.log(high / low), 0.0), 1.0)
    return MATRIX_EFFICIENCY[low] + share * (MATRIX_EFFICIENCY[high] - MATRIX_EFFICIENCY[low])
