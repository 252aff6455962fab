"""Pipeline parallelism: which layers a stage has, and which micro-batch it works on in each tick.

A tick is one clock step of the pipeline. A batch is cut into M pipeline micro-batches and passes the P stages
in M + P - 1 ticks (GPipe's schedule, https://arxiv.org/abs/1811.06965): in tick t, stage s works on
micro-batch t - s. Between two ticks every stage sends its output to the next one, by one collective permute.
After the last forward tick, the backward ticks run in reverse order, and gradients go the other way.

All ranks have the same graph, because stage and tick are data: tensors choose which micro-batch a rank looks
at, and whether its input is the embedding or what it received. So there is one graph for all forward ticks
and one for all backward ticks, and their size does not depend on M (model/stage.py).

- Bubble: before its first micro-batch and after its last, a stage computes on finite numbers that reach no
  loss, so their gradients are exactly 0. This is the fraction (P - 1) / (M + P - 1) of its time.
- Memory: what the backward needs lives between a forward tick and its backward tick, at most M + P - 1 times.
  Under full recomputation that is the inputs of the layers and the stage's output. Logits and losses live
  within a backward tick.
- Padding layers: every stage has ceil(layers / P) layers. Where P does not divide the layers, the last one of
  some stages is padding: it is computed, and its output is ignored.
- Embedding and head: in one graph for all ranks every stage has to hold both. So their vocabulary is divided
  over the stages, too (the group `vocabulary`): nothing is computed twice, all ranks need the same memory,
  and tied weights are one tensor. In a tick all stages embed the micro-batch that stage 0 begins, and compute
  logits of the one that the last stage has finished. Each tick needs an all-reduce of [tokens, features] over
  the stages after the embedding, one before the head, and their transposes in the backward.
"""

import math
from dataclasses import dataclass

import torch

from parallel.collectives import permute, sum_over_stages
from parallel.mesh import ALONE, Group

IGNORE_INDEX = -100  # the label of a token that is no target


@dataclass(frozen=True)
class Pipeline:
    """The stages as one rank sees them.

    `group` has one rank of each stage; `vocabulary`, the ranks that divide the vocabulary (None: the tensor
    parallel ranks alone); `num_microbatches` is into how many pipeline micro-batches a batch is cut.
    """

    group: Group = ALONE
    vocabulary: Group | None = None
    num_microbatches: int = 1

    @property
    def is_last(self) -> bool:
        """Whether the rank belongs to the last stage."""
        return self.group.rank() == self.group.size() - 1

    def layer_ids_of_stages(self, layers: int) -> list[list[int]]:
        """The layer ids of each stage, for a model of `layers` layers. An id from `layers` on is a padding
        layer.

        The first stages have one real layer more where the counts differ. Raises ValueError where there are
        fewer layers than stages.
        """
        stages, ids, first = self.group.size(), [], 0
        if layers < stages:
            raise ValueError(
                f"the model's num_hidden_layers {layers} is less than --pipeline_parallel_size {stages}: "
                "a stage "
                "would have no layer"
            )
        count, more = divmod(layers, stages)
        for stage in range(stages):
            last = first + count + (stage < more)
            padding = [layers + stage] if more and stage >= more else []
            ids.append([*range(first, last), *padding])
            first = last
        return ids

    def layer_ids(self, layers: int) -> list[int]:
        """The layer ids of this rank's stage."""
        return self.layer_ids_of_stages(layers)[self.group.rank()]

    def counterparts(self, layer_id: int, layers: int) -> list[int]:
        """The ids of the layers that other stages have in the position of this stage's layer `layer_id`."""
        position = self.layer_ids(layers).index(layer_id)
        return [ids[position] for ids in self.layer_ids_of_stages(layers) if ids[position] != layer_id]

    def skip_padding(
        self, layer_input: torch.Tensor, layer_output: torch.Tensor, layers: int, stage_index: torch.Tensor
    ) -> torch.Tensor:
        """The output of a stage's last layer, or its input where that layer is padding."""
        more = layers % self.group.size()
        return torch.where(stage_index < more, layer_output, layer_input) if more else layer_output

    def microbatches(self, rows: int) -> int:
        """Into how many micro-batches `rows` rows are cut: fewer than num_microbatches where those do not
        divide them (in an evaluation, say)."""
        return math.gcd(self.num_microbatches, rows)

    def ticks(self, rows: int) -> int:
        """How many ticks `rows` rows take; 1 where there is one stage and one micro-batch."""
        return self.microbatches(rows) + self.group.size() - 1

    def microbatch(self, batch: dict[str, torch.Tensor], number: torch.Tensor) -> dict[str, torch.Tensor]:
        """The rows of the micro-batch with this number, integer [1] on the device. Numbers are clamped to
        those that exist."""
        count = self.microbatches(len(batch["input_ids"]))
        if count == 1:
            return batch
        number = number.clamp(0, count - 1)
        return {
            name: tensor.unflatten(0, (count, -1)).index_select(0, number).squeeze(0)
            for name, tensor in batch.items()
        }

    def finished_microbatch(
        self, batch: dict[str, torch.Tensor], tick: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The rows of the micro-batch that the last stage finishes in this tick; in the first ticks there is
        none, and the rows are padding without targets."""
        number = tick - (self.group.size() - 1)
        rows, exists = self.microbatch(batch, number), number >= 0
        empty = (("labels", IGNORE_INDEX), ("segment_ids", 0))
        return rows | {name: torch.where(exists, rows[name], value) for name, value in empty}

    def stage_input(
        self, embedded: torch.Tensor, previous_output: torch.Tensor, stage_index: torch.Tensor
    ) -> torch.Tensor:
        """The input of this stage: `embedded` rows in the first stage, else the output of the stage before in
        the previous tick. `previous_output` is this stage's own, which the next stage receives. All have one
        shape."""
        if self.group.size() == 1:
            return embedded
        return torch.where(stage_index == 0, embedded, permute(previous_output, self.group, 1))

    def from_last_stage(self, tensor: torch.Tensor, stage_index: torch.Tensor) -> torch.Tensor:
        """The last stage's tensor, on all stages."""
        if self.group.size() == 1:
            return tensor
        chosen = torch.where(stage_index == self.group.size() - 1, tensor, torch.zeros_like(tensor))
        return sum_over_stages(chosen, self.group)


ONE_STAGE = Pipeline()
