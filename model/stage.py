"""The two ticks in which a micro-batch passes a pipeline stage (parallel/pipeline.py), each with a mark_step
behind it.

What differs from rank to rank, or from tick to tick, is data: one graph serves all forward ticks, and another
all backward ticks. Autograd's record of a forward tick waits for its backward tick: what it keeps are outputs
of the one graph and inputs of the other. So it keeps little: masks and angles are made again, and of a
product its operands are kept, no transposed copies of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import torch_xla
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from model.llama import Llama
from model.lora import LoraLinear
from parallel.collectives import permute


@dataclass
class Passage:
    """What a stage has done in a forward tick, and what its backward tick needs of it.

    `output` [tokens, features] is for the next stage, and of the last for the head, which leaves its gradient
    in output.grad. `given`: what the layers have read, of the same shape. Both are leaves; `made` and
    `embedded` are where their gradients go on: into the layers, and into the embedding (None where it is
    frozen).
    """

    model: Llama
    given: torch.Tensor
    output: torch.Tensor
    made: GradientEdge | None
    embedded: GradientEdge | None

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        """Add to the parameters' gradients. `gradient` is what the backward of the tick after this one has
        returned.

        The first stage's goes into the embedding; the others' is for the stage before.
        """
        arrived = permute(gradient, self.model.pipeline.group, -1)
        torch.autograd.backward([self.made], [self.output.grad + arrived])
        first, nothing = self.model.stage_index == 0, torch.zeros_like(self.given)
        if self.embedded:
            torch.autograd.backward([self.embedded], [torch.where(first, self.given.grad, nothing)])
        return torch.where(first, nothing, self.given.grad)


def forward_tick(
    model: Llama, batch: dict[str, torch.Tensor], tick: torch.Tensor, sent: torch.Tensor
) -> Passage:
    """A stage's part of tick number `tick`, integer [1], of a batch; `sent` is the output of the tick before,
    or zeros.

    Without autograd (torch.no_grad) nothing is kept.
    """
    pipeline, learns = model.pipeline, torch.is_grad_enabled()
    _set_seeds(model, pipeline.rows_of(batch, tick - model.stage_index))

    def places():
        rows = pipeline.rows_of(batch, tick - model.stage_index)
        return model.places(rows["position_ids"], rows["segment_ids"])

    kept = _Kept(places)
    with kept, _Products():
        embedded = model.embed(pipeline.rows_of(batch, tick)["input_ids"])
        given = pipeline.take(embedded.detach(), sent.detach(), model.stage_index).requires_grad_(learns)
        made = model.stage(given, *kept.made)
    made_edge, embedded_edge = (
        get_gradient_edge(each) if each.requires_grad else None for each in (made, embedded)
    )
    return Passage(model, given, made.detach().requires_grad_(learns), made_edge, embedded_edge)


def finish(
    model: Llama, batch: dict[str, torch.Tensor], tick: torch.Tensor, output: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(logits, rows) of the micro-batch that the last stage has finished in this tick, of which `output` is a
    stage's output.

    In the first ticks there is none: the rows are padding without targets.
    """
    rows = model.pipeline.finished_rows(batch, tick)
    _set_seeds(model, rows)
    return model.head(output, len(rows["labels"])), rows


def _set_seeds(model, rows):
    if any(isinstance(layer, LoraLinear) and layer.drops for layer in model.modules()):
        model.token_seeds.set(rows["row_seeds"], rows["input_ids"].shape[1])


def schedule(
    model: Llama, rows: int, length: int, device: torch.device
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """On the device, the numbers of the ticks of `rows` rows of `length` tokens, integers [1], and the zeros
    that the first one is sent; no ticks and None where one stage takes the batch at once."""
    pipeline = model.pipeline
    if pipeline.ticks(rows) == 1:
        return [], None
    norm = model.model.norm
    ranks = norm.tensor_parallel_group.size() if norm.sequence_parallel_enabled else 1
    idle = torch.zeros(
        rows // pipeline.pieces(rows) * length // ranks, model.config.hidden_size, dtype=model.dtype
    )
    return [torch.tensor([tick]).to(device) for tick in range(pipeline.ticks(rows))], idle.to(device)


class _Kept(saved_tensors_hooks):
    """Within, autograd keeps tensors where Python sees them (parallel/graph/live.py looks for them).

    Of what `make` has given (cos, sin, masks) it keeps nothing: the backward makes them again. Of a view it
    keeps a copy (no operation of the graph): torch_xla lets a view hold all that it is a view of, and a
    mark_step would make a result of each.
    """

    def __init__(self, make: Callable[[], tuple[torch.Tensor, torch.Tensor, list[torch.Tensor] | None]]):
        super().__init__(self._pack, self._unpack)
        self.made, self._make = make(), make
        self._kept = {_identity(tensor): number for number, tensor in enumerate(self._tensors())}

    def __exit__(self, *error):
        super().__exit__(*error)
        self._masks = self.made[2]
        if self._masks:
            self._masks.clear()  # a checkpoint of a layer has the list among its arguments
        self.made = self._kept = None

    def _tensors(self):
        cos, sin, masks = self.made
        return [cos, sin, *(masks or ())]

    def _pack(self, tensor):
        if tensor._is_view() and torch_xla._XLAC._check_tensor_need_materialization([tensor])[0]:
            self._kept.setdefault(_identity(tensor), tensor.clone())
        return self._kept.get(_identity(tensor), tensor)

    def _unpack(self, kept):
        if isinstance(kept, torch.Tensor):
            return kept
        if self.made is None:
            cos, sin, masks = self._make()
            if masks:
                self._masks[:] = masks
            self.made = cos, sin, self._masks
        return self._tensors()[kept]


_identity = torch_xla._XLAC._xla_get_tensor_id


class _Products(TorchFunctionMode):
    """Within, linear layers are products of the kind below."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        return (_Product.apply if function is F.linear else function)(*arguments, **(keywords or {}))


class _Product(torch.autograd.Function):
    """x W^T + b of x [tokens, features], for whose backward x and W are kept as they are. torch_xla's own
    keeps a transposed copy of W, and of x one more for each layer that reads it."""

    @staticmethod
    def forward(ctx, x, weight, bias=None):
        of_x, of_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return (
            None if weight is None else grad @ weight,
            None if x is None else grad.t() @ x,
            grad.sum(0) if any(ctx.needs_input_grad[2:]) else None,
        )
