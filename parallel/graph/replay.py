"""Runs a function's graph again without calling the function: recordings, and when they may be used.

What is between two mark_steps records the same graph every time, or it should. After two traces that agree, the compiled
graph is started with new inputs instead. An input of the graph is

- an argument: a tensor among the arguments of the call,
- state: a tensor that was alive before the call (parameters, optimizer state, accumulators, a cache), or
- a constant: data that the function made. It must have been equal in both traces.

An output is part of the function's result, or the new data of a state tensor.

What a trace would have seen must not be missed. Before each replay, the arguments are compared (shapes, dtypes, Python
values), and everything that the function can reach (parallel/graph/watched.py): if anything was replaced, the call is
traced. And calls are traced at growing distances. If such a trace differs from what would have been replayed, the graph
is traced always from then on, with a warning.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from parallel.graph import backend
from parallel.graph.difference import input_use, output_made
from parallel.graph.watched import Watched

LARGEST_DISTANCE = 256  # between two traces of one graph, in calls
TRIES = 4  # traces that may disagree before a graph is taken for one that changes every time


class NotReplayable(Exception):
    """A function whose graph has to be traced every time, and why."""


@dataclass
class Trace:
    """What one traced call showed.

    sources: for each input of the graph ("argument", its number), ("state", the tensor) or ("constant", its data).
    updates: (state tensor, number of the output that is its new data). result: the function's result, with an Output in
    place of each tensor.
    """

    graph: bytes
    sources: list[tuple[str, Any]]
    updates: list[tuple[torch.Tensor, int]]
    result: Any

    def difference(self, other: "Trace") -> str | None:
        """What another trace of the same function shows that is not so here; None where they agree."""
        if self.graph != other.graph:
            return "it has another graph"
        for number, (mine, theirs) in enumerate(zip(self.sources, other.sources, strict=True)):
            (kind, value), (other_kind, other_value) = mine, theirs
            if kind != other_kind or kind == "state" and value is not other_value:
                return f"input {number} is another tensor"
            if kind == "argument" and value != other_value:
                return f"input {number} is another argument"
            if kind == "constant" and not _equal(value, other_value):
                return f"a value changes that is no tensor of the state (input {number})"
        mine, theirs = ([(id(tensor), number) for tensor, number in each.updates] for each in (self, other))
        if mine != theirs or self.result != other.result:
            return "it updates other tensors"
        return None


@dataclass(frozen=True)
class Output:
    """A tensor of a function's result: an output of the graph, or an argument that it returns."""

    kind: str
    number: int


@dataclass
class Recorder:
    """The history of one graph name on one rank. `banned` says why it is traced always."""

    function: Any = None
    key: Any = None
    last: Trace | None = None
    ready: bool = False
    banned: str = ""
    watched: Watched | None = None
    distance: int = 2
    since: int = 0
    disagreed: int = 0
    said: set[str] = field(default_factory=set)

    def can_replay(self, function: Callable, key: Any) -> bool:
        """Whether the recording is of this very function and such arguments, and no trace is due."""
        return (
            self.ready
            and self.since < self.distance
            and _same_function(function, self.function)
            and key == self.key
            and self.watched.unchanged()
        )

    def replay(self, arguments: list[torch.Tensor]) -> Any:
        """Start the compiled graph with these arguments; returns the function's result."""
        self.since += 1
        inputs = [arguments[value] if kind == "argument" else value for kind, value in self.last.sources]
        outputs = backend.run_compiled(self.last.graph, inputs)
        for tensor, number in self.last.updates:
            tensor.data = outputs[number]
        return _fill(self.last.result, outputs, arguments)

    def take(self, function: Callable, key: Any, inputs: tuple, trace: Trace) -> str:
        """Remember a traced call; returns what is to be warned of, or an empty string."""
        expected = self.ready and _same_function(function, self.function) and key == self.key
        expected = expected and self.watched.unchanged()
        same_call = self.last is not None and _same_function(function, self.function) and key == self.key
        problem = self.last.difference(trace) if same_call else "first"
        self.function, self.key, self.last, self.since = function, key, trace, 0
        self.watched = Watched([function, *inputs])
        if problem is None:
            self.distance = min(2 * self.distance, LARGEST_DISTANCE) if self.ready else 2
            self.ready = True
            return ""
        self.ready, self.distance = False, 2
        if problem == "first":
            return ""
        self.disagreed += 1
        if expected:
            self.banned = f"{problem}, and calls since the trace before may have been replayed wrongly"
        elif self.disagreed >= TRIES:
            self.banned = problem
        return self.banned


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


def describe(graph: bytes, before: list[torch.Tensor], handles: dict, arguments: list[torch.Tensor],
             pending: list[torch.Tensor], result: Any) -> Trace:
    """The trace of a call. `before`: the tensors that were alive; `handles`: of their data, as it was before the call."""
    numbers = {backend.tensor_id(tensor): number for number, tensor in enumerate(arguments)}
    of_argument = {handle: number for number, tensor in enumerate(arguments) if (handle := handles.get(id(tensor)))}
    of_state = {handles[id(tensor)]: tensor for tensor in before if id(tensor) in handles}
    sources = []
    for identity, data in backend.graph_inputs_with_ids(pending):
        handle = backend.data_handle(data)
        if identity in numbers:
            sources.append(("argument", numbers[identity]))
        elif handle in of_argument:
            sources.append(("argument", of_argument[handle]))
        elif handle in of_state:
            sources.append(("state", of_state[handle]))
        else:
            sources.append(("constant", data))
    places = {id(tensor): number for number, tensor in enumerate(pending)}
    template, returned = _template(result, places, {id(tensor): number for number, tensor in enumerate(arguments)})
    alive = {id(tensor) for tensor in before}
    updates = [(tensor, number) for number, tensor in enumerate(pending) if id(tensor) in alive]
    strays = [number for number, tensor in enumerate(pending) if id(tensor) not in alive and number not in returned]
    if strays:
        text = backend.hlo_text(pending)
        raise NotReplayable(f"a tensor outlives the call that is not in its result: {output_made(text, strays[0])}")
    return Trace(graph, sources, updates, template)
