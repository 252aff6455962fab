"""Where a rank is and since when: noted in memory, at each mark_step and before whatever may take long."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple


class Phase(NamedTuple):
    """What a rank does, in words. `waits`: for a device or for other ranks, so it is not the late one.
    `slow`: it may take much longer than a step without being stuck."""

    text: str
    waits: bool = False
    slow: bool = False


TRACING = Phase("tracing")
STARTING = Phase("starting the graph", waits=True)  # a device that is busy with the one before keeps it there
COMPILING = Phase("compiling", slow=True)
IN_PYTHON = Phase("in Python after the graph")
PREPARING = Phase("preparing the step")


class Place(NamedTuple):
    """Where a rank is: how many beginnings and ends of mark_steps it has passed, the optimizer step (1-based;
    0: none yet), the graph, and since which reading of the clock, in seconds."""

    count: int
    step: int
    graph: str | None
    phase: Phase
    since: float


class Progress:
    """A rank's own note of its `place`. Only the thread that trains writes it; any may read it.

    The methods of a GraphListener (parallel/runtime/rank.py) are called in each mark_step: three notes take
    two microseconds.
    """

    is_opaque_to_replay = True  # parallel/graph/watched.py

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self.place = Place(0, 0, None, Phase("starting", slow=True), clock())

    def at(self, what: str, slow: bool = False) -> None:
        """The rank begins to do something that is no mark_step, such as "reading the checkpoint".

        To be called again, with the same words, when a part of it is done: so long work is not taken for a
        rank that is stuck. `slow` is for work that cannot do so.
        """
        count, step, *_ = self.place
        self.place = Place(count, step, None, Phase(what, slow=slow), self._clock())

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Within this context the rank waits for a device or for other ranks: `what` says where, such as "at
        a barrier"."""
        before = self.place
        self.place = before._replace(phase=Phase(what, waits=True), since=self._clock())
        try:
            yield
        finally:
            self.place = before._replace(since=self._clock())

    def begin_step(self, step: int) -> None:
        """The optimizer step with this 1-based number begins."""
        self.place = Place(self.place.count, step, None, PREPARING, self._clock())

    def tracing(self, name: str | None) -> None:
        """A mark_step begins."""
        count, step, *_ = self.place
        self.place = Place(count + 1, step, name, TRACING, self._clock())

    def traced(self, name: str | None) -> None:
        """The graph is about to be compiled, if it is new, and started."""
        count, step, *_ = self.place
        self.place = Place(count, step, name, STARTING, self._clock())

    def started(self, name: str | None) -> None:
        """The mark_step ends."""
        count, step, *_ = self.place
        self.place = Place(count + 1, step, name, IN_PYTHON, self._clock())


@cache
def here() -> Progress:
    """The note of this process, once and for all. Ranks that are threads have one each, in their Runtime."""
    return Progress()
