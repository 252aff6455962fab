"""Runs a function's graph again without calling the function: recordings, and when they may be used.

What is between two mark_steps records the same graph every time, or it should. After two traces that agree,
the compiled graph is started with new inputs instead. An input of the graph is

- an argument: a tensor among the arguments of the call,
- state: a tensor that was alive before the call (parameters, optimizer state, accumulators, a cache), or
- a constant: data that the function made. It must have been equal in both traces.

An output is part of the function's result, or the new data of a state tensor.

What a trace would have seen must not be missed. Before each replay, the arguments are compared (shapes,
dtypes, Python values), and everything that the function can reach (parallel/graph/watched.py): if anything
was replaced, the call is traced. And calls are traced at growing distances. If such a trace differs from what
would have been replayed, the graph is traced always from then on, with a warning.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from parallel.graph import backend
from parallel.graph.difference import input_use, output_made
from parallel.graph.live import RECORDED
from parallel.graph.watched import Watched

LARGEST_DISTANCE = 256  # between two traces of one graph, in calls
TRIES = 4  # traces that may disagree before a graph is taken for one that changes every time


class NotReplayable(Exception):
    """A function whose graph has to be traced every time, and why."""


@dataclass
class Trace:
    """What one traced call showed.

    sources: for each input of the graph ("argument", its number), ("state", the tensor) or ("constant", its
    data). updates: (state tensor or number of an argument, number of the output that is its new data).
    result: the function's result, with an Output in place of each tensor.
    """

    graph: bytes
    sources: list[tuple[str, Any]]
    updates: list[tuple[torch.Tensor | int, int]]
    result: Any

    def difference(self, other: "Trace", pending: list[torch.Tensor]) -> str | None:
        """What another trace of the same function shows that is not so here; None where they agree.

        `pending`: the outputs of the other trace's graph, which has not been executed yet.
        """
        if self.graph != other.graph:
            return "it has another graph"
        for number, (mine, theirs) in enumerate(zip(self.sources, other.sources, strict=True)):
            (kind, value), (other_kind, other_value) = mine, theirs
            if kind != other_kind or kind == "state" and value is not other_value:
                used = input_use(backend.hlo_text(pending), number)
                return f"a tensor that it uses is another one (used at {used})"
            if kind == "argument" and value != other_value:
                return f"argument {other_value} is used where argument {value} was"
            if kind == "constant" and not _equal(value, other_value):
                used = input_use(backend.hlo_text(pending), number)
                return f"a Python number, or data made in it, changes (used at {used})"
        mine, theirs = (
            [(target if isinstance(target, int) else id(target), number) for target, number in each.updates]
            for each in (self, other)
        )
        if mine != theirs or self.result != other.result:
            return "it updates other tensors"
        return None


@dataclass(frozen=True)
class Output:
    """A tensor of a function's result: an output of the graph, or an argument that it returns."""

    kind: str
    number: int


class Recorder:
    """The history of one graph name on one rank. `banned` says why it is traced every time; empty while it
    need not be."""

    def __init__(self):
        self.banned = ""
        self._function = self._key = self._trace = self._watched = None
        self._ready, self._distance, self._since, self._disagreed = False, 2, 0, 0

    def _same_call(self, function: Callable, key: Any) -> bool:
        return self._trace is not None and _same_function(function, self._function) and key == self._key

    def can_replay(self, function: Callable, key: Any, arguments: list[torch.Tensor]) -> bool:
        """Whether there is a recording of this very call, and a trace is neither due nor needed.

        It is needed where something that the function can reach has changed, and where an input waits for
        operations that were recorded outside.
        """
        if not self._ready or self._since >= self._distance or not self._same_call(function, key):
            return False
        return self._watched.unchanged() and not any(backend.are_pending(self._inputs(arguments)))

    def _inputs(self, arguments):
        return [arguments[value] if kind == "argument" else value for kind, value in self._trace.sources]

    def replay(self, arguments: list[torch.Tensor]) -> Any:
        """Start the compiled graph with these arguments; returns the function's result."""
        self._since += 1
        outputs = backend.run_compiled(self._trace.graph, self._inputs(arguments))
        for target, number in self._trace.updates:
            (arguments[target] if isinstance(target, int) else target).data = outputs[number]
        return _fill(self._trace.result, outputs, arguments)

    def add(self, function: Callable, key: Any, inputs: tuple, trace: Trace, pending: list) -> None:
        """Add a traced call, whose graph's outputs are `pending`."""
        problem = "it is another call"
        if self._same_call(function, key):
            problem = self._trace.difference(trace, pending)
        if problem is None:
            self._distance = min(2 * self._distance, LARGEST_DISTANCE) if self._ready else 2
        else:
            self._disagreed += self._trace is not None
            if self._ready and self._same_call(function, key) and self._watched.unchanged():
                self.banned = (
                    f"{problem}: the calls since its last trace were replayed with what was traced then"
                )
            elif self._disagreed >= TRIES:
                self.banned = problem
            self._distance = 2
        self._ready = problem is None
        self._function, self._key, self._trace, self._since = function, key, trace, 0
        self._watched = Watched([function, *inputs])

    def ban(self, reason: str) -> None:
        """Trace this graph every time from now on."""
        self.banned = reason
        self._trace = self._watched = self._function = None
        self._ready = False


def traced_always(function: Callable) -> Callable:
    """Marks a function that is never replayed, because it leaves more than the tensors of its result."""
    function.is_traced_always = True
    return function


def flatten(thing: Any, tensors: list[torch.Tensor]) -> Any:
    """A key of nested arguments that two equal calls have in common; appends their tensors to `tensors`."""
    if isinstance(thing, torch.Tensor):
        tensors.append(thing)
        return (thing.shape, thing.dtype)
    if isinstance(thing, dict):
        return ("dict", *((name, flatten(value, tensors)) for name, value in thing.items()))
    if isinstance(thing, (list, tuple)):
        return (type(thing), *(flatten(value, tensors) for value in thing))
    if isinstance(thing, (int, float, bool, str, type(None))):
        return (type(thing), thing)
    return ("object", id(thing))


class Before:
    """What was on a rank's device before a call, and which of it are arguments of the call.

    A graph's input is known by the id of the tensor that it was, or by the handle of its data. Both are of
    the moment before the call, because an update in place changes them.
    """

    def __init__(self, tensors: list[torch.Tensor], arguments: list[torch.Tensor]):
        self.tensors, self.arguments = tensors, arguments
        numbers = {id(tensor): number for number, tensor in enumerate(arguments)}
        self._sources: dict[Any, tuple[str, Any]] = {}
        for tensor, pending in zip(tensors, backend.are_pending(tensors), strict=True):
            number = numbers.get(id(tensor))
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


def trace_of(graph: bytes, before: Before, pending: list[torch.Tensor], result: Any) -> Trace:
    """What a call showed that left these tensors pending, the graph's outputs.

    Raises NotReplayable where a tensor outlives the call that is neither state nor in its result.
    """
    sources = [before.source(identity, data) for identity, data in backend.graph_inputs(pending)]
    argument_numbers = {id(tensor): number for number, tensor in enumerate(before.arguments)}
    output_numbers = {id(tensor): number for number, tensor in enumerate(pending)}
    template, returned = _template(result, output_numbers, argument_numbers)
    known = {id(tensor) for tensor in before.tensors}
    updates = [
        (argument_numbers.get(id(tensor), tensor), number)
        for number, tensor in enumerate(pending)
        if id(tensor) in known
    ]
    strays = [n for n, tensor in enumerate(pending) if id(tensor) not in known and n not in returned]
    if strays:
        made = output_made(backend.hlo_text(pending), strays[0])
        raise NotReplayable(f"a tensor outlives the call that is not in its result, {made}")
    return Trace(graph, sources, updates, template)


def _template(result, outputs, arguments):
    """(the result with an Output for each tensor, the numbers of the graph's outputs in it)."""
    if isinstance(result, torch.Tensor):
        if id(result) in outputs:
            return Output("output", outputs[id(result)]), {outputs[id(result)]}
        if id(result) in arguments:
            return Output("argument", arguments[id(result)]), set()
        raise NotReplayable("its result has a tensor that this graph does not compute")
    if isinstance(result, (list, tuple)):
        pairs = [_template(each, outputs, arguments) for each in result]
        return type(result)(each for each, _ in pairs), set().union(*(numbers for _, numbers in pairs))
    if isinstance(result, (int, float, str, type(None))):
        return result, set()
    raise NotReplayable(f"its result has a {type(result).__name__}, which may hold tensors")


def _fill(template, outputs, arguments):
    if isinstance(template, Output):
        return (outputs if template.kind == "output" else arguments)[template.number]
    if isinstance(template, (list, tuple)):
        return type(template)(_fill(each, outputs, arguments) for each in template)
    return template


def _same_function(one, other) -> bool:
    """Whether two references are to one function, bound to the same object."""
    inner, other_inner = (getattr(each, "__func__", each) for each in (one, other))
    return inner is other_inner and getattr(one, "__self__", None) is getattr(other, "__self__", None)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two constants are equal. The host waits for the device."""
    if one is other or backend.data_handle(one) == backend.data_handle(other):
        return True
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())
