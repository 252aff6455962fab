"""Pipeline parallelism: the layers divided over stages, in ticks that are the same graph on all ranks.

A batch goes through the stages in M micro-batches, in M + P - 1 ticks (GPipe's schedule,
https://arxiv.org/abs/1811.06965). In tick t stage s works on micro-batch t - s, and between two ticks every
stage sends what it has computed to the next one, by one collective permute. When all have gone forward, the
ticks come in reverse order, and gradients go the other way. Stage and tick are data: which micro-batch a rank
looks at, and whether it takes embedded rows or what was sent to it, are chosen by tensors. So there is one
graph of a forward tick and one of a backward tick, whose size does not depend on M (model/stage.py). A graph
of all ticks grows with M, and what lives at once in it is the compiler's choice: of Llama-3 70B, more than a
core has.

In the ticks before its first micro-batch and after its last a stage computes all the same, on what is at
hand: numbers that are finite, and that reach no loss, so that their gradients are exactly 0. Of its time a
stage spends the part (P - 1) / (M + P - 1) so, the bubble. Between its two ticks live what the backward needs
of the forward (under full recomputation the inputs of the layers and the stage's output), of all M + P - 1 of
them at the turning point; logits and losses live within a backward tick.

The stages have equally many slots for layers, ceil(layers / P). Where the counts differ, the last slot of
some stages is spare: its layer is computed and x passes it by.

Embedding and head do not sit at the ends. In one graph for all ranks every stage would have to hold and to
compute both, for nothing on all stages but one. So their vocabulary is divided over the stages too (the group
`vocabulary`): nothing is computed twice, all ranks need the same memory, and tied weights are one tensor. In
a tick all stages embed the micro-batch that stage 0 begins, and have the logits of the one that the last
stage has finished. It costs, of each tick, an all-reduce of [tokens, features] over the stages behind the
embedding, one in front of the head, and their duals.
"""

import math
from dataclasses import dataclass

import torch

from parallel.collectives import permute, sum_over_stages
from parallel.mesh import ALONE, Group


@dataclass(frozen=True)
class Pipeline:
    """The stages as one rank sees them: its place among them, the ranks that divide the vocabulary (None: the
    tensor parallel ranks alone), and into how many micro-batches a batch is cut."""

    group: Group = ALONE
    vocabulary: Group | None = None
    num_microbatches: int = 1

    @property
    def is_last(self) -> bool:
        """Whether the rank is of the last stage."""
        return self.group.rank() == self.group.size() - 1

    def dealt(self, layers: int) -> list[list[int]]:
        """The numbers of the layers in each stage's slots; in a spare slot, one that no layer of the model
        has.

        The first stages have one layer more where the counts differ. Raises ValueError where there are fewer
        layers than stages.
        """
        stages, held, first = self.group.size(), [], 0
        if layers < stages:
            raise ValueError(
                f"the model's num_hidden_layers {layers} is less than --pipeline_parallel_size {stages}: a stage "
                "would have no layer"
            )
        count, more = divmod(layers, stages)
        for stage in range(stages):
            last = first + count + (stage < more)
            held.append([*range(first, last), *([layers + stage] if more and stage >= more else [])])
            first = last
        return held

    def slots(self, layers: int) -> list[int]:
        """Those of this stage."""
        return self.dealt(layers)[self.group.rank()]

    def beside(self, number: int, layers: int) -> list[int]:
        """The numbers of the layers that other stages have in the slot of this stage's layer `number`."""
        slot = self.slots(layers).index(number)
        return [held[slot] for held in self.dealt(layers) if held[slot] != number]

    def pass_by_spare(
        self, x: torch.Tensor, y: torch.Tensor, layers: int, stage_index: torch.Tensor
    ) -> torch.Tensor:
        """y of the last slot's layer, or x where that slot is spare."""
        more = layers % self.group.size()
        return torch.where(stage_index < more, y, x) if more else y

    def pieces(self, rows: int) -> int:
        """Into how many micro-batches `rows` rows are cut; fewer than num_microbatches where those do not
        divide them (of an evaluation, say)."""
        return math.gcd(self.num_microbatches, rows)

    def ticks(self, rows: int) -> int:
        """How many ticks so many rows take; 1 where there is nothing to pass on."""
        return self.pieces(rows) + self.group.size() - 1

    def rows_of(self, batch: dict[str, torch.Tensor], number: torch.Tensor) -> dict[str, torch.Tensor]:
        """The rows of the micro-batch whose number, integer [1], is data; the first or last one where there
        is none of it."""
        count = self.pieces(len(batch["input_ids"]))
        if count == 1:
            return batch
        number = number.clamp(0, count - 1)
        return {
            name: tensor.unflatten(0, (count, -1)).index_select(0, number).squeeze(0)
            for name, tensor in batch.items()
        }

    def finished_rows(self, batch: dict[str, torch.Tensor], tick: torch.Tensor) -> dict[str, torch.Tensor]:
        """The rows of the micro-batch that the last stage finishes in this tick; padding without targets
        where there is none."""
        number = tick - (self.group.size() - 1)
        rows, there = self.rows_of(batch, number), number >= 0
        return rows | {
            name: torch.where(there, rows[name], nothing)
            for name, nothing in (("labels", -100), ("segment_ids", 0))
        }

    def take(self, embedded: torch.Tensor, sent: torch.Tensor, stage_index: torch.Tensor) -> torch.Tensor:
        """What this stage works on: embedded rows in the first, what the stage before has `sent` in the
        others. Of one shape."""
        if self.group.size() == 1:
            return embedded
        return torch.where(stage_index == 0, embedded, permute(sent, self.group, 1))

    def from_last_stage(self, tensor: torch.Tensor, stage_index: torch.Tensor) -> torch.Tensor:
        """The last stage's tensor, on all stages."""
        if self.group.size() == 1:
            return tensor
        chosen = torch.where(stage_index == self.group.size() - 1, tensor, torch.zeros_like(tensor))
        return sum_over_stages(chosen, self.group)


ONE_STAGE = Pipeline()
