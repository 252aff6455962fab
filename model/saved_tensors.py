"""What autograd saves in a forward tick, apart from its record of how to go back (model/stage.py)."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from model.layer_kinds import StageInputs
from parallel.graph import backend


class BackwardRecord:
    """How autograd goes back through a forward tick: from the stage's output to its input, and into the
    embedding.

    It holds no tensor of the tick but the parameters. What autograd saves goes into a list, of which the
    record has the numbers. So it serves every tick whose forward has the same graph, also one that was
    replayed, each with a list of its own. StageInputs are not saved: the backward computes them again.
    """

    is_opaque_to_replay = True  # parallel/graph/watched.py

    def __init__(self):
        self._output_edge: GradientEdge | None = None
        self._embedding_edge: GradientEdge | None = None
        self._input_grad: torch.Tensor | None = None
        self._inputs = StageInputs(None, None)  # a checkpoint of a layer holds the object
        self._anchor = torch.zeros((), requires_grad=True)  # makes autograd record layers that train nothing
        self._forget()

    def _forget(self) -> None:
        """Let go of the tensors of the tick."""
        self._compute, self._saved, self._packed = None, [], {}
        self._fill(StageInputs(None, None))

    @contextmanager
    def saving(self, compute: Callable[[], StageInputs], saved: list[torch.Tensor]) -> Iterator[StageInputs]:
        """Within this context autograd saves tensors in `saved`; gives the result of `compute`."""
        self._fill(compute())
        self._saved = saved
        self._packed = {backend.tensor_id(each): ("input", n) for n, each in enumerate(self._layer_tensors())}
        with saved_tensors_hooks(self._pack, self._unpack):
            yield self._inputs
        self._forget()

    def stage_input(self, x: torch.Tensor) -> torch.Tensor:
        """The same tensor, as the input at which `backward` ends."""
        return _StageInput.apply(x, self._anchor, self)

    def ends(self, output: torch.Tensor, embedded: torch.Tensor) -> None:
        """Tell from where `backward` starts: the stage's output, and the embedding's, if it trains."""
        self._output_edge, self._embedding_edge = (
            get_gradient_edge(each) if each.requires_grad else None for each in (output, embedded)
        )

    def backward(
        self,
        saved: list[torch.Tensor],
        compute: Callable[[], StageInputs],
        output_grad: torch.Tensor,
        is_first: torch.Tensor,
    ) -> torch.Tensor:
        """Add to the parameters' gradients; returns that of the stage's input, or zeros where it is the
        first.

        `saved` and `compute` are as in `saving`. The gradients are [tokens, features]; is_first, bool [1]:
        whether this is the first stage, whose gradient goes into the embedding.
        """
        self._saved, self._compute = saved, compute
        torch.autograd.backward([self._output_edge], [output_grad], retain_graph=True)
        input_grad, self._input_grad = self._input_grad, None
        zeros = torch.zeros_like(input_grad)
        if self._embedding_edge:
            embedding_grad = torch.where(is_first, input_grad, zeros)
            torch.autograd.backward([self._embedding_edge], [embedding_grad], retain_graph=True)
        self._forget()
        return torch.where(is_first, zeros, input_grad)

    def _fill(self, values: StageInputs) -> None:
        vars(self._inputs).update(vars(values))

    def _layer_tensors(self):
        inputs = self._inputs
        tensors = [*itertools.chain(*inputs.rotary, *(inputs.masks or ())), inputs.token_seeds]
        return [each for each in tensors if each is not None]

    def _pack(self, tensor):
        if isinstance(tensor, torch.nn.Parameter):
            return tensor
        identity = backend.tensor_id(tensor)
        if identity not in self._packed:
            self._packed[identity] = ("saved", len(self._saved))
            # torch_xla lets a view hold everything that it is a view of, and a mark_step would return all of
            # that. A copy costs no operation.
            is_view = tensor._is_view() and backend.are_pending([tensor])[0]
            self._saved.append((tensor.clone() if is_view else tensor).detach())
        return self._packed[identity]

    def _unpack(self, packed):
        if isinstance(packed, torch.Tensor):
            return packed
        kind, number = packed
        if kind == "saved":
            return self._saved[number].clone()  # optimization barriers change what they get in place
        if self._inputs.rotary is None:
            self._fill(self._compute())
        return self._layer_tensors()[number]


class _StageInput(torch.autograd.Function):
    """The identity; the backward leaves the gradient in the record."""

    @staticmethod
    def forward(ctx, x, anchor, record):
        ctx.record = record
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.record._input_grad = grad
        return None, None, None
