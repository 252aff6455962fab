"""Forward and backward of a micro-batch through pipeline stages: all ticks forward, then all ticks backward.

parallel/pipeline.py says what a tick is, model/stage.py what a stage computes in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from model.stage import StageActivations, backward_through_stage, forward_tick

if TYPE_CHECKING:
    from trainer.build import TrainState


def forward_backward_in_ticks(
    state: TrainState, batch: dict[str, torch.Tensor], mark_step: Callable[..., object]
) -> None:
    """As trainer.loop.forward_backward, with several stages.

    `mark_step` is the runtime's: one graph for all forward ticks and one for all backward ticks. Or it is
    `without_mark_step`, and all ticks become part of one graph.
    """
    ticks, zeros = state.schedule.ticks, state.schedule.zero_activations
    activations, output = [], zeros
    for tick in ticks:
        activations.append(mark_step("forward", forward_tick, state.model, batch, tick, output))
        output = activations[-1].stage_output
    input_grad = zeros
    for tick in reversed(ticks):
        input_grad = mark_step("backward", backward_tick, state, batch, tick, activations.pop(), input_grad)


def backward_tick(
    state: TrainState,
    batch: dict[str, torch.Tensor],
    tick: torch.Tensor,
    activations: StageActivations,
    next_grad: torch.Tensor,
) -> torch.Tensor:
    """The loss of the micro-batch that the last stage has finished, and this stage's backward; adds to the
    accumulator.

    `activations` are those of the forward tick of the same number. `next_grad` [tokens, features] is what
    the backward tick before this one returned. Returns the gradient for the stage before.
    """
    stage_output = activations.stage_output.detach().requires_grad_()
    rows = state.model.pipeline.finished_microbatch(batch, tick)
    loss_sum, counts = state.objective.loss_and_counts(state.model, stage_output, rows)
    loss_sum.backward()
    input_grad = backward_through_stage(state.model, batch, tick, activations, stage_output.grad, next_grad)
    state.accumulator.add(counts)
    return input_grad


def without_mark_step(name: str, function: Callable[..., object], *inputs) -> object:
    """Call the function; what it records becomes part of the graph that is being recorded."""
    return function(*inputs)
