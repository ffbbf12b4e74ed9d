"""How the ranks of a run are arranged: which of them share a batch, which compute the same, which hold another part."""

from typing import Any, NamedTuple


class Mesh(NamedTuple):
    """Ranks count through the tensor or sequence group first, then data, then pipeline, as DeepSpeed orders them."""

    rank: int
    world_size: int
    pipeline: int = 1
    """Ranks among which the layers are divided, consecutive ones to each."""
    tensor: int = 1
    """Ranks over which the matrices of every layer are split."""
    sequence: int = 1
    """Ranks over which the tokens of every row are split."""

    @property
    def data(self) -> int:
        """Groups of ranks that each take other rows."""
        return self.world_size // (self.pipeline * self.tensor * self.sequence)

    @property
    def pipeline_rank(self) -> int:
        return self.rank // (self.world_size // self.pipeline)

    @property
    def data_rank(self) -> int:
        return self.rank % (self.world_size // self.pipeline) // (self.tensor * self.sequence)

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor

    @property
    def sequence_rank(self) -> int:
        return self.rank % self.sequence

    @property
    def counts(self) -> bool:
        """Whether this rank's loss sums belong in a total over all ranks, in which every token is counted once."""
        return self.pipeline_rank == self.pipeline - 1 and self.tensor_rank == 0

    def __str__(self) -> str:
        parts = {"pipeline stages": self.pipeline, "tensor": self.tensor, "sequence": self.sequence}
        words = [f"{name} {size}" for name, size in parts.items() if size > 1]
        return ", ".join([f"{self.world_size} rank{'s' if self.world_size > 1 else ''}", *words])


def read_mesh(
    config: dict[str, Any], rank: int, world_size: int, pipeline_stages: int | None
) -> tuple[Mesh, list[str]]:
    """The arrangement that a filled JSON asks for on this launch, and a sentence for each reason why it cannot be.

    `pipeline_stages` (the launch's flag) fills `pipeline.stages` "auto", which otherwise means all ranks.
    """
    problems = []
    section = config.get("pipeline")
    if pipeline_stages is not None and section is None:
        problems.append(f"--pipeline_stages {pipeline_stages} has no pipeline to cut: take ds_configs/pipeline.json")
    sizes = {"pipeline": 1, "tensor": 1, "sequence": 1}
    if isinstance(section, dict):
        section.setdefault("partition", "flops")
        if section.get("stages", "auto") == "auto":
            section["stages"] = pipeline_stages or world_size
        elif pipeline_stages is not None and section["stages"] != pipeline_stages:
            problems.append(
                f"pipeline.stages is {section['stages']!r} but --pipeline_stages is {pipeline_stages}: make them equal or "
                '"auto"'
            )
        sizes["pipeline"] = section["stages"]
    if isinstance(config.get("tensor_parallel"), dict):
        sizes["tensor"] = config["tensor_parallel"].get("autotp_size", 1)
    sizes["sequence"] = config.get("sequence_parallel_size", 1)
    places = {
        "pipeline": "pipeline.stages",
        "tensor": "tensor_parallel.autotp_size",
        "sequence": "sequence_parallel_size",
    }
    for axis, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            problems.append(f"{places[axis]} must be a whole number above 0, got {size!r}")
            sizes[axis] = 1
    used = [f"{places[axis]} {size}" for axis, size in sizes.items() if size > 1]
    if len(used) > 1:
        problems.append(f"{' and '.join(used)} cannot be combined: keep one, and ZeRO over the remaining ranks")
        sizes = dict.fromkeys(sizes, 1)
    for axis, size in sizes.items():
        if world_size % size:
            divisors = [n for n in range(2, world_size + 1) if world_size % n == 0]
            problems.append(
                f"{places[axis]} {size} does not divide the {world_size} rank{'s' if world_size > 1 else ''} of this launch: "
                + (f"use {' or '.join(map(str, divisors[:4]))}" if divisors else f"start at least {size} processes")
            )
            sizes[axis] = 1
    return Mesh(rank, world_size, **sizes), problems
