"""The forward and the backward of one pipeline stage in one tick, each followed by a mark_step
(parallel/pipeline.py).

What differs from rank to rank or from tick to tick is data, so one graph serves all forward ticks and another
one all backward ticks. What autograd saves in a forward tick is the result of the one graph and an input of
the other. So as little as possible is saved: masks and rotary angles are computed again
(model/saved_tensors.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from model.layer_kinds import StageInputs
from model.llama import Llama
from model.saved_tensors import BackwardRecord
from parallel.collectives import permute


class StageActivations(NamedTuple):
    """What a forward tick leaves for the backward tick of the same number.

    stage_output: [tokens, features]. saved: what autograd needs for the backward. record: how autograd goes
    back from the output; it holds no tensor of the tick, so one record serves all ticks with the same graph.
    """

    stage_output: torch.Tensor
    saved: list[torch.Tensor]
    record: BackwardRecord


def forward_tick(
    model: Llama, batch: dict[str, torch.Tensor], tick: torch.Tensor, previous_output: torch.Tensor
) -> StageActivations:
    """The forward of this rank's stage in tick number `tick`, integer [1].

    `previous_output` [tokens, features] is this stage's output of the tick before, or zeros. Without autograd
    (torch.no_grad) nothing is saved for a backward.
    """
    pipeline, record, saved = model.pipeline, BackwardRecord(), []
    with record.saving(_stage_layer_inputs(model, batch, tick), saved) as inputs:
        embedded = model.embed(pipeline.microbatch(batch, tick)["input_ids"])
        stage_input = pipeline.stage_input(embedded.detach(), previous_output.detach(), model.stage_index)
        output = model.stage(record.stage_input(stage_input), inputs)
    record.ends(output, embedded)
    return StageActivations(output.detach(), saved, record)


def backward_through_stage(
    model: Llama,
    batch: dict[str, torch.Tensor],
    tick: torch.Tensor,
    activations: StageActivations,
    head_grad: torch.Tensor,
    next_grad: torch.Tensor,
) -> torch.Tensor:
    """Add to the parameters' gradients; returns the gradient for the stage before.

    All gradients are [tokens, features]. `head_grad` is that of stage_output from the head. `next_grad` is
    what this function returned in the tick before this one; the stage that it is for receives it here. The
    first stage's gradient goes into the embedding, and it returns zeros.
    """
    output_grad = head_grad + permute(next_grad, model.pipeline.group, -1)
    inputs = _stage_layer_inputs(model, batch, tick)
    return activations.record.backward(activations.saved, inputs, output_grad, model.stage_index == 0)


def _stage_layer_inputs(
    model: Llama, batch: dict[str, torch.Tensor], tick: torch.Tensor
) -> Callable[[], StageInputs]:
    """A function that computes the StageInputs of the micro-batch that this stage has in this tick."""

    def compute():
        rows = model.pipeline.microbatch(batch, tick - model.stage_index)
        return model.layer_inputs(rows["position_ids"], rows["segment_ids"], rows.get("row_seeds"))

    return compute


@dataclass
class Schedule:
    """The ticks of a batch on the device: their numbers, integers [1], and the zeros [tokens, features] that
    stand for the output of a tick before the first one. A batch that one stage takes at once has no ticks."""

    ticks: list[torch.Tensor]
    zero_activations: torch.Tensor | None = None


def schedule(model: Llama, rows: int, length: int, device: torch.device) -> Schedule:
    """The schedule of batches of `rows` rows of `length` tokens."""
    pipeline = model.pipeline
    count = pipeline.ticks(rows)
    if count == 1:
        return Schedule([])
    norm = model.model.norm
    ranks = norm.tensor_parallel_group.size() if norm.sequence_parallel_enabled else 1
    tokens = rows // pipeline.microbatches(rows) * length // ranks
    zeros = torch.zeros(tokens, model.config.hidden_size, dtype=model.dtype)
    return Schedule([torch.tensor([tick]).to(device) for tick in range(count)], zeros.to(device))
