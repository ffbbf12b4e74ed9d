"""What a run is planned for: devices, the nodes that hold them, what joins them, what they cost.

`--hardware` names it: `h100x64` (a device of the list below and how many), a YAML file with the fields of `Hardware`, or `this`
(what this machine has; `thisx2`: for so many ranks on it).
"""

import re
from pathlib import Path
from typing import NamedTuple, Self

import psutil
import torch
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from launch.topology import Topology
from training.config import Section, did_you_mean
from training.environment import environment, free_memory_bytes
from training.yaml_files import read_yaml

GIB = 2**30
NODE = 8
"""Devices that the nodes of the list have."""


class Device(Section):
    """What one rank computes on. Rates are peaks; what a program reaches of them is the business of whoever asks."""

    name: str
    kind: str = Field(default="cuda", pattern="^(cuda|cpu)$")
    """As `torch.device` calls it (an AMD GPU is `cuda` too)."""
    memory: PositiveInt
    """Bytes that a program can have; on CPUs a rank's share of the host's."""
    bf16_flops: PositiveFloat | None = None
    """Operations a second in dense bf16 matrix products; null: to be measured."""
    memory_bandwidth: PositiveFloat | None = None
    """Bytes a second."""
    watts: PositiveFloat | None = None
    """That it draws at most, without the node around it."""


class Hardware(Section):
    device: Device
    devices: PositiveInt
    """In all."""
    devices_per_node: PositiveInt
    host_memory: PositiveInt
    """Bytes a node, beside those of GPUs."""
    inside_bandwidth: PositiveFloat | None = None
    """Bytes a second that a device sends to others of its node, in one direction; null: to be measured."""
    between_bandwidth: PositiveFloat | None = None
    """Bytes a second that a device sends to other nodes, in one direction, while the others of its node do the same."""
    inside_latency: PositiveFloat = 10e-6
    """Seconds until the first byte of a message arrives."""
    between_latency: PositiveFloat = 20e-6
    price: PositiveFloat | None = None
    """Money a device hour, in your currency; the list has none, since it depends on whom you pay."""
    source: str | None = None
    """Where the figures are from."""

    @model_validator(mode="after")
    def _nodes_are_full(self) -> Self:
        if self.devices > self.devices_per_node and self.devices % self.devices_per_node:
            raise ValueError(
                f"devices {self.devices} are not whole nodes of {self.devices_per_node}: take a multiple, or change "
                "devices_per_node"
            )
        return self

    @property
    def nodes(self) -> int:
        return -(-self.devices // self.devices_per_node)

    def topology(self, rank: int = 0) -> Topology:
        """Who the rank with this number would be, one rank a device."""
        here = min(self.devices_per_node, self.devices)
        return Topology(rank, rank % here, self.devices, torch.device(self.device.kind), here)

    def __str__(self) -> str:
        what = {"cuda": "device", "cpu": "rank"}[self.device.kind] + "s" * (self.devices > 1)
        nodes = f" in {self.nodes:,} nodes" if self.nodes > 1 else ""
        return f"{self.devices:,} {what}{nodes}: {self.device.name}, {self.device.memory / GIB:,.1f} GiB each"


class Listed(NamedTuple):
    """A device as its vendor's node of eight has it."""

    gibibytes: int
    """As torch counts them, rounded down."""
    bf16_teraflops: float
    """Dense: half of what data sheets give with sparsity."""
    memory_terabytes_a_second: float
    watts: int
    host_terabytes: int
    inside_gigabytes_a_second: float
    """Half of what data sheets give for both directions together."""
    between_gigabytes_a_second: float
    source: str


LIST = {
    "a100-40gb": Listed(39, 312, 1.555, 400, 1, 300, 25, "data sheets of NVIDIA A100 40 GB SXM and DGX A100"),
    "a100": Listed(79, 312, 2.039, 400, 2, 300, 25, "data sheets of NVIDIA A100 80 GB SXM and DGX A100"),
    "l40s": Listed(44, 362, 0.864, 350, 1, 32, 12.5, "data sheet of NVIDIA L40S; PCIe 4.0 x16, 100 Gb/s a device"),
    "h100": Listed(79, 989, 3.35, 700, 2, 450, 50, "data sheets of NVIDIA H100 SXM and DGX H100"),
    "h200": Listed(139, 989, 4.8, 700, 2, 450, 50, "data sheets of NVIDIA H200 SXM and DGX H200"),
    "b200": Listed(178, 2250, 8.0, 1000, 2, 900, 50, "data sheets of NVIDIA HGX B200 and DGX B200"),
    "mi300x": Listed(191, 1307, 5.3, 750, 2, 448, 50, "data sheet of AMD MI300X; its platform, 400 Gb/s a device"),
    "mi325x": Listed(255, 1307, 6.0, 1000, 2, 448, 50, "data sheet of AMD MI325X; its platform, 400 Gb/s a device"),
}


def find_hardware(words: str) -> Hardware:
    """What the flag `--hardware` means. Raises ValueError in one sentence where it means nothing."""
    if words.endswith((".yaml", ".yml")) or Path(words).is_file():
        return _of_file(Path(words))
    match = re.fullmatch(r"(.+?)(?:x([1-9]\d*))?", words.lower())
    name, number = (match[1], int(match[2] or 1)) if match else (words, 1)
    if name == "this":
        return _of_this_machine(int(match[2]) if match and match[2] else None)
    if name not in LIST:
        raise ValueError(
            f"--hardware {words}: no such device{did_you_mean(name, [*LIST, 'this'])}; write a name and a number such as "
            "h100x64, a YAML file with the fields of planner/hardware.py, or this"
        )
    return of_list(name, number)


def of_list(name: str, devices: int) -> Hardware:
    """So many devices of the list, in nodes of eight. Raises ValueError where these would not be full."""
    one = LIST[name]
    device = Device(
        name=name,
        memory=one.gibibytes * GIB,
        bf16_flops=one.bf16_teraflops * 1e12,
        memory_bandwidth=one.memory_terabytes_a_second * 1e12,
        watts=one.watts,
    )
    return _checked(
        f"--hardware {name}x{devices}",
        {
            "device": device,
            "devices": devices,
            "devices_per_node": min(NODE, devices),
            "host_memory": one.host_terabytes * 10**12,
            "inside_bandwidth": one.inside_gigabytes_a_second * 1e9,
            "between_bandwidth": one.between_gigabytes_a_second * 1e9,
            "source": one.source,
        },
    )


def _of_file(path: Path) -> Hardware:
    return _checked(str(path), {"source": str(path)} | read_yaml(path, "hardware"))


def _checked(where: str, fields: dict) -> Hardware:
    try:
        return Hardware.model_validate(fields)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            place = ".".join(str(part) for part in problem["loc"])
            known = Device if place.startswith("device.") else Hardware
            near = did_you_mean(str(problem["loc"][-1]), [*known.model_fields]) if place else ""
            message = problem["msg"].removeprefix("Value error, ")
            message = f"unknown key{near}" if problem["type"] == "extra_forbidden" else message
            lines.append(": ".join(filter(None, [where, place, message])))
        raise ValueError("\n".join(lines)) from None


def _of_this_machine(ranks: int | None) -> Hardware:
    """Its GPUs, or its processor for so many ranks (1 unless said); rates are taken from the list where it knows the GPU."""
    host = min(psutil.virtual_memory().total, free_memory_bytes(torch.device("cpu")))
    if not torch.cuda.is_available():
        ranks = ranks or 1
        device = Device(name=environment()["cpu"], kind="cpu", memory=host // ranks)
        return Hardware(device=device, devices=ranks, devices_per_node=ranks, host_memory=host, source="this machine")
    there = torch.cuda.device_count()
    if ranks and ranks > there:
        raise ValueError(
            f"--hardware thisx{ranks}: this machine has {there} GPUs: ask for that many, or name the device"
        )
    properties, devices = torch.cuda.get_device_properties(0), ranks or there
    words = set(re.findall(r"[a-z0-9]+", properties.name.lower()))
    close = [
        name for name, one in LIST.items() if name.partition("-")[0] in words and _alike(one, properties.total_memory)
    ]
    listed = of_list(close[0], devices) if close and devices <= NODE else None
    same = listed.device.model_dump() if listed else {}
    device = Device.model_validate({**same, "name": properties.name, "memory": properties.total_memory})
    fields = {"device": device, "devices": devices, "devices_per_node": devices, "host_memory": host}
    rest = listed.model_dump(exclude={*fields, "source"}) if listed else {}
    return Hardware.model_validate({**rest, **fields, "source": "this machine"})


def _alike(one: Listed, memory: int) -> bool:
    return abs(memory / GIB - one.gibibytes) < 0.1 * one.gibibytes
