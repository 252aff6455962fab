"""Pipeline parallelism: the layers divided over stages, as one graph that all ranks trace.

A batch goes through the stages in M micro-batches, in M + P - 1 ticks (GPipe's schedule, https://arxiv.org/abs/1811.06965). In
tick t stage s works on micro-batch t - s, and between two ticks every stage sends what it has computed to the next one, by one
collective permute. The stage is data: which micro-batch a rank looks at, and whether it takes the embedded batch or what was
sent to it, are chosen by a tensor. In the ticks before its first micro-batch and after its last a stage computes all the same, on
what is at hand: numbers that are finite, and that reach no output, so that their gradients are exactly 0. Of its time a stage
spends the part (P - 1) / (M + P - 1) so, the bubble; the backward, which autograd makes of the forward, has the same. Until then
the activations of all ticks are kept, or under full recomputation the inputs of their layers.

The stages have equally many slots for layers, ceil(layers / P). Where the counts differ, the last slot of some stages is spare:
its layer is computed and x passes it by.

Embedding and head do not sit at the ends. In one graph for all ranks every stage would have to hold and to compute both, for
nothing on all stages but one. So their vocabulary is divided over the stages too (the group `vocabulary`): nothing is computed
twice, all ranks need the same memory, and tied weights are one tensor. It costs, of all micro-batches together, an all-reduce of
[positions of the rank, rows, features] over the stages behind the embedding, one in front of the head, and their duals.
"""
from collections.abc import Callable
from dataclasses import dataclass

import torch

from parallel.collectives import send_to_next_stage, sum_over_stages
from parallel.mesh import ALONE, Group


@dataclass(frozen=True)
class Pipeline:
    """The stages as one rank sees them: its place among them, the ranks that divide the vocabulary (None: the tensor parallel
    ranks alone), and into how many micro-batches a batch is cut."""

    group: Group = ALONE
    vocabulary: Group | None = None
    num_microbatches: int = 1

    @property
    def is_last(self) -> bool:
        """Whether the rank is of the last stage."""
        return self.group.rank() == self.group.size() - 1

    def slots(self, layers: int) -> list[int]:
        """The numbers of the layers in this stage's slots; in a spare slot, one that no layer of the model has.

        The first stages have one layer more where the counts differ. Raises ValueError where there are fewer layers than stages.
        """
        stages, stage = self.group.size(), self.group.rank()
        if layers < stages:
            raise ValueError(f"the model's num_hidden_layers {layers} is less than --pipeline_parallel_size {stages}: a stage "
                             "would have no layer")
        count, more = divmod(layers, stages)
        first = stage * count + min(stage, more)
        held = list(range(first, first + count + (stage < more)))
        return [*held, layers + stage] if more and stage >= more else held

    def pass_by_spare(self, x: torch.Tensor, y: torch.Tensor, layers: int, stage_index: torch.Tensor) -> torch.Tensor:
        """y of the last slot's layer, or x where that slot is spare."""
        more = layers % self.group.size()
        return torch.where(stage_index < more, y, x) if more else y

    def run(self, stage: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x: torch.Tensor, num_microbatches: int,
            stage_index: torch.Tensor) -> torch.Tensor:
        """What the last stage makes of x [positions, rows, features], of the same shape; other stages get other finite numbers.

        `stage(x, microbatch)` is what each does with the rows [positions, rows / num_microbatches, features] of the micro-batch
        whose number is `microbatch`, integer [1], as data. `stage_index` [1] is this rank's place among the stages.
        """
        stages = self.group.size()
        micro_batches = x.split(x.shape[1] // num_microbatches, 1) if num_microbatches > 1 else [x]
        outputs: list[torch.Tensor] = []
        for tick in range(num_microbatches + stages - 1):
            given = micro_batches[min(tick, num_microbatches - 1)]
            if outputs and stages > 1:
                given = torch.where(stage_index == 0, given, send_to_next_stage(outputs[-1], self.group))
            outputs.append(stage(given, (tick - stage_index).clamp(0, num_microbatches - 1)))
        return torch.cat(outputs[stages - 1:], 1) if num_microbatches > 1 else outputs[-1]

    def from_last_stage(self, tensor: torch.Tensor, stage_index: torch.Tensor) -> torch.Tensor:
        """The last stage's tensor, on all stages."""
        if self.group.size() == 1:
            return tensor
        chosen = torch.where(stage_index == self.group.size() - 1, tensor, torch.zeros_like(tensor))
        return sum_over_stages(chosen, self.group)


ONE_STAGE = Pipeline()


def rows_of(tensor: torch.Tensor, dim: int, num_microbatches: int, microbatch: torch.Tensor) -> torch.Tensor:
    """The rows, along `dim`, of the micro-batch whose number is data: `microbatch`, integer [1]."""
    if num_microbatches == 1:
        return tensor
    return tensor.unflatten(dim, (num_microbatches, -1)).index_select(dim, microbatch).squeeze(dim)
