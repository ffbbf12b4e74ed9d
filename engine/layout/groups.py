"""The process groups of a mesh, in the form in which DeepSpeed asks for them (its `mpu`)."""

import torch.distributed as dist

from engine.layout.mesh import Mesh


class Groups:
    """One group along each way through the mesh over which something is summed or exchanged. Collective over all ranks.

    To ZeRO the ranks of a sequence group are data-parallel ranks: they hold the same parameters. `holders`: whether that
    group is wanted as well.
    """

    def __init__(self, mesh: Mesh, holders: bool = False) -> None:
        self.mesh = mesh
        self._made: dict[str, dist.ProcessGroup] = {}
        if mesh.tensor > 1:
            self._made["tensor"] = self._along("tensor")
            self._made["replicas"] = self._along("data", "sequence")
        if mesh.sequence > 1:
            self._made["sequence"] = self._along("sequence")
        if holders:
            self._made["holders"] = self._along("data", "sequence", "tensor")

    def _along(self, *axes: str) -> dist.ProcessGroup:
        all_ranks = self.mesh.groups_along(*axes)
        if len(all_ranks) == 1:
            assert dist.group.WORLD is not None
            return dist.group.WORLD
        made = [dist.new_group(ranks) for ranks in all_ranks]
        return next(group for group, ranks in zip(made, all_ranks, strict=True) if self.mesh.rank in ranks)

    @property
    def tensor(self) -> dist.ProcessGroup:
        """With this rank's tokens, and other parts of the matrices."""
        return self._made["tensor"]

    @property
    def sequence(self) -> dist.ProcessGroup:
        """With other tokens of this rank's rows."""
        return self._made["sequence"]

    @property
    def replicas(self) -> dist.ProcessGroup:
        """With the same part of the model; there where it is divided by tensor parallelism."""
        return self._made["replicas"]

    @property
    def holders(self) -> dist.ProcessGroup:
        """With this rank's layers, or parts of them."""
        return self._made["holders"]

    # What DeepSpeed calls. Only without a pipeline, for which it makes groups by itself.
    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.replicas

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.replicas)

    def get_data_parallel_world_size(self) -> int:
        return self.replicas.size()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.tensor

    def get_model_parallel_rank(self) -> int:
        return self.mesh.tensor_rank

    def get_model_parallel_world_size(self) -> int:
        return self.mesh.tensor

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
