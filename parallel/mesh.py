"""The pp x dp x tp grid of ranks: integers and replica groups only.

Tensor parallel ranks are neighbours (they communicate most), then data parallel, then pipeline stages, as in
Megatron-LM and neuronx-distributed: rank = (pp_rank * dp + dp_rank) * tp + tp_rank.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Group:
    """One rank's place in one way of dividing the world.

    `replica_groups` lists every group of the division (XLA wants all of them in each collective); `index` is
    the position of this rank in its own. `size()` and `rank()` are named as in torch's ProcessGroup.
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
    """The grid as one rank sees it: its tensor, data and pipeline parallel groups, and the ranks that share a
    copy of the model.

    `pp` has one rank of each stage, in their order; `model` has all tensor parallel ranks of all stages,
    ordered by stage.
    """

    rank: int
    world_size: int
    tp: Group
    dp: Group
    pp: Group
    model: Group

    @classmethod
    def create(
        cls, rank: int, world_size: int, tensor_parallel_size: int = 1, pipeline_parallel_size: int = 1
    ) -> "Mesh":
        """The mesh at `rank`; raises ValueError where the world cannot be divided."""
        tp, pp = tensor_parallel_size, pipeline_parallel_size
        if tp < 1 or pp < 1 or world_size % (tp * pp):
            stages = f" x --pipeline_parallel_size {pp}" if pp != 1 else ""
            raise ValueError(
                f"the world size {world_size} is not divisible by --tensor_parallel_size {tp}{stages}: "
                f"start a multiple of {tp * pp} ranks, or choose a divisor of {world_size}"
            )
        stage = world_size // pp  # ranks of one
        p, d, t = rank // stage, rank % stage // tp, rank % tp
        dp_groups = [
            list(range(first + of, first + stage, tp))
            for first in range(0, world_size, stage)
            for of in range(tp)
        ]
        pp_groups = [list(range(first, world_size, stage)) for first in range(stage)]
        model_groups = [
            [first + of for first in range(of_dp, world_size, stage) for of in range(tp)]
            for of_dp in range(0, stage, tp)
        ]
        return cls(
            rank,
            world_size,
            _neighbours(rank, world_size, tp),
            Group(dp_groups, d),
            Group(pp_groups, p),
            Group(model_groups, p * tp + t),
        )

    @property
    def world(self) -> Group:
        """All ranks."""
        return _neighbours(self.rank, self.world_size, self.world_size)

    def replicas(self, count: int) -> Group:
        """The `count` neighbours in the tensor parallel group that hold the same slice of a parameter."""
        groups = [
            group[first : first + count]
            for group in self.tp.replica_groups
            for first in range(0, len(group), count)
        ]
        return Group(groups, self.tp.rank() % count)


def _neighbours(rank: int, world_size: int, count: int) -> Group:
    return Group([list(range(first, first + count)) for first in range(0, world_size, count)], rank % count)
