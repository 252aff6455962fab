"""The forward and the backward of one pipeline stage in one tick, each followed by a mark_step
(parallel/pipeline.py).

What differs from rank to rank or from tick to tick is data, so one graph serves all forward ticks and another
one all backward ticks. Autograd keeps what it saved in a forward tick until the backward tick: those tensors
are outputs of the one graph and inputs of the other. So as little as possible is saved: masks and rotary
angles are computed again, and a matrix product saves its operands and no transposed copies of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from model.decoder_layer import LayerInputs
from model.llama import Llama
from parallel.collectives import permute
from parallel.graph import backend
from parallel.graph.replay import traced_always


@dataclass
class StageActivations:
    """What a forward tick leaves for the backward tick of the same number.

    `stage_input` and `stage_output` [tokens, features] are leaves: the gradient of the output is in
    stage_output.grad (of the last stage, from the head), that of the input in stage_input.grad after
    `backward`. `output_edge` and `embedding_edge` are where autograd continues: into the layers, and into the
    embedding (None where it is frozen).
    """

    model: Llama
    stage_input: torch.Tensor
    stage_output: torch.Tensor
    output_edge: GradientEdge | None
    embedding_edge: GradientEdge | None

    def backward(self, output_grad: torch.Tensor) -> torch.Tensor:
        """Add to the parameters' gradients; returns the gradient [tokens, features] for the stage before.

        `output_grad` [tokens, features] is what this method returned in the tick before this one; the stage
        that it is for receives it here. The first stage's gradient goes into the embedding, and it returns
        zeros.
        """
        received = permute(output_grad, self.model.pipeline.group, -1)
        torch.autograd.backward([self.output_edge], [self.stage_output.grad + received])
        first, zeros = self.model.stage_index == 0, torch.zeros_like(self.stage_input)
        if self.embedding_edge:
            embedding_grad = torch.where(first, self.stage_input.grad, zeros)
            torch.autograd.backward([self.embedding_edge], [embedding_grad])
        input_grad = torch.where(first, zeros, self.stage_input.grad)
        # The object outlives this tick's graph; what is alive at a mark_step is an output of its graph and
        # takes memory.
        self.stage_input.grad = self.stage_output.grad = self.output_edge = self.embedding_edge = None
        return input_grad


@traced_always  # autograd's record of it, which the backward tick needs, is no tensor
def forward_tick(
    model: Llama, batch: dict[str, torch.Tensor], tick: torch.Tensor, previous_output: torch.Tensor
) -> StageActivations:
    """The forward of this rank's stage in tick number `tick`, integer [1].

    `previous_output` [tokens, features] is this stage's output of the tick before, or zeros. Without autograd
    (torch.no_grad) nothing is kept for a backward.
    """
    pipeline, trains = model.pipeline, torch.is_grad_enabled()

    def layer_inputs():
        rows = pipeline.microbatch(batch, tick - model.stage_index)
        return model.layer_inputs(rows["position_ids"], rows["segment_ids"], rows.get("row_seeds"))

    with _ComputedAgain(layer_inputs) as inputs, _SavesOperands():
        embedded = model.embed(pipeline.microbatch(batch, tick)["input_ids"])
        stage_input = pipeline.stage_input(embedded.detach(), previous_output.detach(), model.stage_index)
        stage_input.requires_grad_(trains)
        output = model.stage(stage_input, inputs)
    output_edge, embedding_edge = (
        get_gradient_edge(each) if each.requires_grad else None for each in (output, embedded)
    )
    stage_output = output.detach().requires_grad_(trains)
    return StageActivations(model, stage_input, stage_output, output_edge, embedding_edge)


def finished_logits(
    model: Llama, batch: dict[str, torch.Tensor], tick: torch.Tensor, stage_output: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(logits, rows) of the micro-batch that the last stage finishes in this tick, on all stages.

    `stage_output` is this rank's. In the first ticks no micro-batch is finished, and the rows are padding
    without targets.
    """
    rows = model.pipeline.finished_microbatch(batch, tick)
    seeds = model.dropout_seeds(rows.get("row_seeds"), rows["input_ids"].shape[1])
    return model.head(stage_output, len(rows["labels"]), seeds), rows


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


class _ComputedAgain(saved_tensors_hooks):
    """Within this context autograd saves no LayerInputs (`compute`): the backward computes them again.

    Of a view it saves a copy, which costs no operation: torch_xla lets a view hold everything that it is a
    view of, and a mark_step would return all of that. Saved tensors stay where Python sees them, for
    parallel/graph/live.py.
    """

    def __init__(self, compute: Callable[[], LayerInputs]):
        super().__init__(self._pack, self._unpack)
        self._compute, self._inputs, self._numbers = compute, None, {}

    def __enter__(self) -> LayerInputs:
        super().__enter__()
        self._inputs = self._compute()
        self._numbers = {backend.tensor_id(each): number for number, each in enumerate(self._tensors())}
        return self._inputs

    def __exit__(self, *error):
        super().__exit__(*error)
        self._fill(
            LayerInputs(None, None, None)
        )  # a checkpoint of a layer holds the object, so it is emptied
        self._numbers = {}

    def _fill(self, values: LayerInputs) -> None:
        vars(self._inputs).update(vars(values))

    def _tensors(self):
        inputs = self._inputs
        return [
            each
            for each in (inputs.cos, inputs.sin, *(inputs.masks or ()), inputs.token_seeds)
            if each is not None
        ]

    def _pack(self, tensor):
        identity = backend.tensor_id(tensor)
        if tensor._is_view() and backend.are_pending([tensor])[0]:
            self._numbers.setdefault(identity, tensor.clone())
        return self._numbers.get(identity, tensor)

    def _unpack(self, saved):
        if isinstance(saved, torch.Tensor):
            return saved
        if self._inputs.cos is None:
            self._fill(self._compute())
        return self._tensors()[saved]


class _SavesOperands(TorchFunctionMode):
    """Within this context F.linear saves its operands as they are."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        return (_Linear.apply if function is F.linear else function)(*arguments, **(keywords or {}))


class _Linear(torch.autograd.Function):
    """x W^T + b of x [tokens, features], whose backward keeps x and W. torch_xla's own keeps a transposed
    copy of W, and of x one more for each layer with that input."""

    @staticmethod
    def forward(ctx, x, weight, bias=None):
        trains_x, trains_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if trains_weight else None, weight if trains_x else None)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return (
            None if weight is None else grad @ weight,
            None if x is None else grad.t() @ x,
            grad.sum(0) if any(ctx.needs_input_grad[2:]) else None,
        )
