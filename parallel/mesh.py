"""The pp x dp x tp grid of ranks: integers and replica groups only.

Tensor parallel ranks are neighbours (they communicate most), then data parallel, then pipeline stages, as in Megatron-LM and
neuronx-distributed: rank = (pp_rank * dp + dp_rank) * tp + tp_rank.
"""
from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """One rank's place in one way of dividing the world.

    `replica_groups` lists every group of the division (XLA wants all of them in each collective); `index` is the position of
    this rank in its own. `size()` and `rank()` are named as in torch's ProcessGroup.
    """

    replica_groups: list[list[int]]
    index: int

    def size(self) -> int:
        return len(self.replica_groups[0])

    def rank(self) -> int:
        return self.index


ALONE = Group([[0]], 0)


@dataclass(frozen=True)
class Mesh:
    """The grid as one rank sees it: its tensor and data parallel groups, and the world."""

    rank: int
    world_size: int
    tp: Group
    dp: Group

    @classmethod
    def create(cls, rank: int, world_size: int, tensor_parallel_size: int = 1) -> "Mesh":
        """The mesh at `rank`; raises ValueError where the world cannot be divided."""
        tp = tensor_parallel_size
        if tp < 1 or world_size % tp:
            raise ValueError(f"the world size {world_size} is not divisible by --tensor_parallel_size {tp}: "
                             f"start a multiple of {tp} ranks, or choose a divisor of {world_size}")
        dp_groups = [list(range(t, world_size, tp)) for t in range(tp)]
        return cls(rank, world_size, _neighbours(rank, world_size, tp), Group(dp_groups, rank // tp))

    @property
    def world(self) -> Group:
        """All ranks."""
        return _neighbours(self.rank, self.world_size, self.world_size)

    def replicas(self, count: int) -> Group:
        """The `count` neighbours in the tensor parallel group that hold the same slice of a parameter."""
        groups = [group[first:first + count] for group in self.tp.replica_groups for first in range(0, len(group), count)]
        return Group(groups, self.tp.rank() % count)


def _neighbours(rank: int, world_size: int, count: int) -> Group:
    return Group([list(range(first, first + count)) for first in range(0, world_size, count)], rank % count)
