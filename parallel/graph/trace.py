"""What one traced call of a function shows: where its graph's inputs come from, and where its outputs go.

An input of the graph is

- an argument: a tensor among the arguments of the call,
- state: a tensor that was alive before the call (parameters, optimizer state, accumulators, a cache), or
- a constant: data that the function made. It must be equal in all calls.

An output is part of the function's result, or the new data of a state tensor.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from parallel.graph import backend
from parallel.graph.difference import input_use, output_made
from parallel.graph.live import RECORDED
from parallel.graph.watched import is_opaque

PLAIN = (int, float, bool, str, type(None), torch.dtype)


class NotReplayable(Exception):
    """A function whose graph has to be traced every time, and why."""


class Call:
    """A function and what it is called with, but for its tensors.

    key: what two calls with one recording have in common: shapes, dtypes, numbers, texts, which objects, and
    torch's modes.
    objects: those objects.
    """

    def __init__(self, function: Callable, inputs: tuple, arguments: list[torch.Tensor]):
        """The tensors among the inputs, which may be nested, are appended to `arguments`."""
        leaves, structure = tree_flatten(inputs)
        arguments += [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self.function = function
        self.objects = [leaf for leaf in leaves if not isinstance(leaf, (torch.Tensor, *PLAIN))]
        modes = torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_autocast_enabled("xla")
        self.key = structure, [_key(leaf) for leaf in leaves], modes

    def same_as(self, other: "Call") -> bool:
        """Whether a recording of the other call may serve for this one."""
        inner, other_inner = (getattr(each.function, "__func__", each.function) for each in (self, other))
        bound, other_bound = (getattr(each.function, "__self__", None) for each in (self, other))
        return inner is other_inner and bound is other_bound and self.key == other.key


def _key(leaf):
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.dtype
    return (type(leaf), leaf) if isinstance(leaf, PLAIN) else id(leaf)


class Output(NamedTuple):
    """A tensor of a function's result: an output of the graph or an argument, by its number, or a state
    tensor."""

    kind: str
    value: int | torch.Tensor

    def tensor(self, outputs: list[torch.Tensor], arguments: list[torch.Tensor]) -> torch.Tensor:
        """The tensor in a call with these arguments, whose graph has these outputs."""
        if self.kind == "state":
            return self.value
        return (outputs if self.kind == "output" else arguments)[self.value]


@dataclass
class Result:
    """A function's result, with an Output in place of each tensor.

    Other leaves are numbers, texts, or objects that are opaque to replay. Such an object of one call serves
    for all calls.
    """

    structure: TreeSpec
    leaves: list[Any]

    def fill(self, outputs: list[torch.Tensor], arguments: list[torch.Tensor]) -> Any:
        """The result of a call with these arguments, whose graph has these outputs."""
        leaves = [
            leaf.tensor(outputs, arguments) if isinstance(leaf, Output) else leaf for leaf in self.leaves
        ]
        return tree_unflatten(leaves, self.structure)

    def with_its_objects(self, result: Any) -> Any:
        """Another call's result with the opaque objects of this one."""
        leaves, structure = tree_flatten(result)
        pairs = zip(leaves, self.leaves, strict=True)
        return tree_unflatten([mine if is_opaque(leaf) else leaf for leaf, mine in pairs], structure)

    def comparable(self) -> Any:
        """What is equal for two results that one recording can give."""
        return self.structure, [_comparable(leaf) for leaf in self.leaves]


def _comparable(leaf):
    if isinstance(leaf, Output):
        return leaf.kind, id(leaf.value) if leaf.kind == "state" else leaf.value
    return type(leaf) if is_opaque(leaf) else leaf


@dataclass
class Trace:
    """What one traced call showed.

    sources: for each input of the graph ("argument", its number), ("state", the tensor) or ("constant", its
    data). updates: (state tensor or number of an argument, number of the output that is its new data).
    """

    graph: bytes
    sources: list[tuple[str, Any]]
    updates: list[tuple[torch.Tensor | int, int]]
    result: Result

    def difference(self, other: "Trace", pending: list[list[torch.Tensor]]) -> str | None:
        """What another trace of the same function shows that is not so here; None where they agree.

        `pending`: the outputs of the other trace's graph (backend.pending_outputs), not executed yet.
        """
        if self.graph != other.graph:
            return "it has another graph"
        for number, (mine, theirs) in enumerate(zip(self.sources, other.sources, strict=True)):
            problem = _source_difference(*mine, *theirs)
            if problem:
                text = backend.hlo_text([same[0] for same in pending])
                return f"{problem} (used at {input_use(text, number)})"
        mine, theirs = (
            [(target if isinstance(target, int) else id(target), number) for target, number in each.updates]
            for each in (self, other)
        )
        if mine != theirs:
            return "it updates other tensors"
        if self.result.comparable() != other.result.comparable():
            return "its result is another one"
        return None


def _source_difference(kind, value, other_kind, other_value) -> str | None:
    if kind != other_kind or kind == "state" and value is not other_value:
        return "a tensor that it uses is another one"
    if kind == "argument" and value != other_value:
        return f"argument {other_value} is used where argument {value} was"
    if kind == "constant" and not _equal(value, other_value):
        return "a Python number, or data made in it, changes"
    return None


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two constants are equal. The host waits for the device."""
    if one is other or backend.data_handle(one) == backend.data_handle(other):
        return True
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())


def without_views(result: Any) -> Any:
    """The result with a copy of each view, which costs no operation: torch_xla lets a view hold everything
    that it is a view of, and the graph would return all of that."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.clone() if tensor._is_view() else tensor, result)


class Before:
    """What was on a rank's device before a call, and which of it are arguments of the call.

    A graph's input is known by the id of the tensor that it was, or by the handle of its data. Both are of
    the moment before the call, because an update in place changes them.
    """

    def __init__(self, tensors: list[torch.Tensor], arguments: list[torch.Tensor]):
        self.tensors, self.arguments = tensors, arguments
        self._numbers = {id(tensor): number for number, tensor in enumerate(arguments)}
        self._sources: dict[Any, tuple[str, Any]] = {}
        for tensor, pending in zip(tensors, backend.are_pending(tensors), strict=True):
            number = self._numbers.get(id(tensor))
            source = ("state", tensor) if number is None else ("argument", number)
            if not pending:
                self._sources.setdefault(backend.data_handle(tensor), source)
            self._sources[backend.tensor_id(tensor)] = source

    def source(self, identity: int, data: torch.Tensor) -> tuple[str, Any]:
        """Where an input of the graph comes from; see Trace.sources."""
        found = self._sources.get(identity) or self._sources.get(backend.data_handle(data))
        if found is None:
            setattr(data, RECORDED, True)
            return ("constant", data)
        return found

    def donate(self, live: list[torch.Tensor], pending: list[list[torch.Tensor]]) -> None:
        """Let the graph of the pending tensors overwrite the data of what it updates, so that the device does
        not hold both; `live` are the tensors after the call.

        Not data that the call made, which a recording may keep as a constant; and not data that a tensor
        without pending operations has, too: torch_xla makes no copy for a clone.
        """
        updated = {id(tensor) for same in pending for tensor in same}
        kept = backend.graph_inputs([tensor for tensor in live if id(tensor) not in updated])
        handles = {backend.data_handle(data) for _, data in kept}
        backend.donate(
            [
                data
                for identity, data in backend.graph_inputs([same[0] for same in pending])
                if id(self._owner(identity)) in updated and backend.data_handle(data) not in handles
            ]
        )

    def _owner(self, identity):
        """The tensor that had this id before the call."""
        kind, value = self._sources.get(identity, ("state", None))
        return self.arguments[value] if kind == "argument" else value

    def trace(self, graph: bytes, pending: list[list[torch.Tensor]], result: Any) -> Trace:
        """What the call showed, which left these tensors pending (backend.pending_outputs).

        Raises NotReplayable where a tensor outlives the call that is neither state nor in its result.
        """
        first = [same[0] for same in pending]
        sources = [self.source(identity, data) for identity, data in backend.graph_inputs(first)]
        leaves, structure = tree_flatten(result)
        outputs = {backend.tensor_id(tensor): number for number, tensor in enumerate(first)}
        leaves = [self._leaf(leaf, outputs) for leaf in leaves]
        known = {id(tensor) for tensor in self.tensors}
        updates = [
            (self._numbers.get(id(tensor), tensor), number)
            for number, same in enumerate(pending)
            for tensor in same
            if id(tensor) in known
        ]
        accounted = {number for _, number in updates} | {
            leaf.value for leaf in leaves if isinstance(leaf, Output) and leaf.kind == "output"
        }
        strays = [number for number in range(len(pending)) if number not in accounted]
        if strays:
            made = output_made(backend.hlo_text(first), strays[0])
            raise NotReplayable(f"a tensor outlives the call that is not in its result, {made}")
        return Trace(graph, sources, updates, Result(structure, leaves))

    def _leaf(self, leaf, outputs):
        """What stands for a leaf of the function's result."""
        if isinstance(leaf, torch.Tensor):
            if leaf.grad_fn is not None:
                raise NotReplayable(
                    "its result has a tensor that autograd can go back from: return x.detach()"
                )
            identity = backend.tensor_id(leaf) if leaf.device.type == "xla" else None
            if identity in outputs:
                return Output("output", outputs[identity])
            if identity in self._sources:
                return Output(*self._sources[identity])
            raise NotReplayable("its result has a tensor that this graph does not compute")
        if isinstance(leaf, PLAIN) or is_opaque(leaf):
            return leaf
        raise NotReplayable(f"its result has a {type(leaf).__name__}, which may hold tensors")
