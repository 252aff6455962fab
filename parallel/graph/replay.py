"""Decides when a function's graph is run again without calling the function: the history of a graph name.

What is between two mark_steps records the same graph every time, or it should. After two traces that agree
(parallel/graph/trace.py), the compiled graph is started with new inputs instead.

What a trace would have seen must not be missed. Before each replay, the arguments are compared (shapes,
dtypes, Python values), and everything that the function can reach (parallel/graph/watched.py): if anything
was replaced, the call is traced. And calls are traced at growing distances. If such a trace differs from what
would have been replayed, the graph is traced always from then on, with a warning.
"""

from typing import Any

import torch

from parallel.graph import backend
from parallel.graph.trace import Call, NotReplayable, Trace
from parallel.graph.watched import Watched

LARGEST_DISTANCE = 256  # between two traces of one graph, in calls
TRIES = 4  # traces that may disagree before a graph is taken for one that changes every time


class Recorder:
    """The history of one graph name on one rank.

    banned: why it is traced every time; empty while it need not be. changed: what was noticed in the last
    trace that is worth a warning; empty if nothing. reads_values: whether a value was read in a trace, so
    that the next one has to find the line.
    """

    def __init__(self):
        self.banned = self.changed = ""
        self.reads_values = False
        self._outside, self._changes = "", 0  # what was changed outside last, before how many calls in a row
        self._call: Call | None = None
        self._trace: Trace | None = None
        self._watched: Watched | None = None
        self._noticed = True
        self._ready, self._distance, self._since, self._disagreed = False, 2, 0, 0

    def can_replay(self, call: Call, arguments: list[torch.Tensor]) -> bool:
        """Whether there is a recording of this very call, and a trace is neither due nor needed.

        It is needed where something that the function can reach has changed, and where an input waits for
        operations that were recorded outside.
        """
        self._noticed = self._trace is None or not call.same_as(self._call)
        if not self._noticed and (change := self._watched.change()):
            self._noticed, self._outside, self._changes = True, change, self._changes + 1
        if self._noticed or not self._ready:
            return False
        self._noticed = any(backend.are_pending(self._inputs(arguments)))
        return not self._noticed and self._since < self._distance

    def _inputs(self, arguments):
        return [arguments[value] if kind == "argument" else value for kind, value in self._trace.sources]

    def replay(self, arguments: list[torch.Tensor]) -> Any:
        """Start the compiled graph with these arguments; returns the function's result."""
        self._since += 1
        outputs = backend.run_compiled(self._trace.graph, self._inputs(arguments))
        backend.set_data(
            [
                (arguments[target] if isinstance(target, int) else target, outputs[number])
                for target, number in self._trace.updates
            ]
        )
        return self._trace.result.fill(outputs, arguments)

    def add(self, call: Call, trace: Trace, pending: list[list[torch.Tensor]]) -> None:
        """Add a traced call, whose graph's outputs are `pending`.

        Raises NotReplayable where the graph has to be traced every time from now on.
        """
        self.changed, same = "", self._trace is not None and call.same_as(self._call)
        if not self._noticed:
            self._outside, self._changes = "", 0
            if change := self._watched.change():
                raise NotReplayable(f"the function changes {change}, which a replay would not do")
        problem = self._trace.difference(trace, pending) if same else "it has other arguments"
        if problem is None:
            self._distance = min(2 * self._distance, LARGEST_DISTANCE) if self._ready else 2
        else:
            if self._ready and not self._noticed:
                since = "the calls since its last trace were replayed with what was traced then"
                raise NotReplayable(f"{problem}: {since}")
            if self._outside:
                problem = f"{self._outside} was changed: {problem}"
            self._disagreed += self._trace is not None
            if self._disagreed >= TRIES:
                raise NotReplayable(problem)
            if self._ready and same and trace.graph == self._trace.graph:  # the guard tells of another one
                self.changed = f"it is traced again: {problem}"
            self._distance, self._trace = 2, trace
        if self._changes == TRIES:
            raise NotReplayable(f"{self._outside} changes before every call")
        # A trace that came after a change from outside does not show that the function changes nothing.
        self._ready = problem is None and not (self._noticed and not self._ready)
        if self._noticed:
            self._watched = Watched([call.function, *call.objects])
        self._call, self._since = call, 0

    def read(self, where: str) -> None:
        """Tell that a value was read in a traced call, and where, if the lines were looked for.

        Raises NotReplayable if they were.
        """
        if self.reads_values:
            raise NotReplayable(f"a value is read in it ({where})")
        self.reads_values, self._trace, self._ready = True, None, False

    def result(self, result: Any) -> Any:
        """The result of a traced call that was added, with those objects of the recording that serve for all
        calls."""
        return self._trace.result.with_its_objects(result) if self._trace else result

    def ban(self, reason: str) -> None:
        """Trace this graph every time from now on."""
        self.banned = reason
        self._trace = self._watched = self._call = None
        self._ready = False
