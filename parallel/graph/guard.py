"""The recompile guard: which graph each named mark_step has, and what changed when it has another one.

A new graph after the first costs minutes on a NeuronCore, and usually comes from a harmless-looking line of
Python. The guard compares hashes. Only a new graph is written as HLO text and compared with the one before
it.

The text names the line of each operation if Python's frames were recorded, which doubles the time of tracing.
So lines are recorded from the start and after a new graph, until one step had known graphs only. Where
graphs are replayed, what is traced has its lines. XLA_IR_DEBUG=1 records them always.
"""

import math
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager

from tqdm import tqdm

from parallel.graph import backend
from parallel.graph.difference import difference


class NewGraph(RuntimeError):
    """A named mark_step has another graph than before, under --on_recompile error."""


class Guard:
    """Rank 0's memory of the graphs of one run. `texts` has the newest HLO text of each graph name."""

    def __init__(self, action: str, compilations: Callable[[], int]):
        """action: warn or error. compilations(): how many graphs this process has compiled.

        Set `traces_rarely` where graphs are replayed.
        """
        self.traces_rarely = False
        self.texts: dict[str, str] = {}
        self._action, self._compilations = action, compilations
        self._hashes: dict[str, set[bytes]] = {}
        self._step = 0
        # What is compiled before the first mark_step, for a mesh, say, is not looked at.
        self._compiled = math.inf
        self._recording_lines, self._new_in_step = True, False
        backend.record_lines(True)

    def begin_step(self, step: int) -> None:
        """The 1-based `step` begins."""
        if self._step and not self._new_in_step and not self.traces_rarely:
            self._recording_lines = False
        self._step, self._new_in_step = step, False

    @contextmanager
    def compiling(self, name: str | None, graph: bytes, tensors: list):
        """Wraps the execution of a mark_step: of what is pending in `tensors`, whose hash is `graph`.

        A mark_step without a name is not compared with anything.
        """
        if name:
            self._check(name, graph, tensors)
        backend.record_lines(False)  # a graph must not be another one because its line moved
        yield
        self._compiled = self._compilations()
        backend.record_lines(self._recording_lines or os.environ.get("XLA_IR_DEBUG") == "1")

    def _check(self, name, graph, tensors):
        value_was_read = self._compilations() > self._compiled
        seen = self._hashes.setdefault(name, set())
        new, before = graph not in seen, self.texts.get(name)
        if new:
            seen.add(graph)
            backend.record_lines(True)  # the text has the lines only where this is on
            self.texts[name] = backend.hlo_text(tensors)
            self._recording_lines = self._new_in_step = True
        where = self._where(name)
        if value_was_read:
            self._report(
                f"{where}: a graph was compiled before it, because a value was read (.item(), .cpu(), "
                "print) that no "
                "mark_step had executed; PT_XLA_DEBUG_LEVEL=1 shows the line"
            )
        elif new and before:
            self._report(f"{where} compiles a new graph: {difference(before, self.texts[name])}")

    def compiled_outside(self, count: int) -> None:
        """So many graphs have been compiled of what was recorded outside of functions."""
        self._compiled += count

    def traced_always(self, name: str, reason: str) -> None:
        """Report that the graph `name` cannot be replayed."""
        self.traces_rarely = False
        self._report(f"{self._where(name)} is traced every time from now on: {reason}")

    def noticed(self, name: str, what: str) -> None:
        """Report what keeps the graph `name` from being replayed for now."""
        self._report(f"{self._where(name)}: {what}")

    def _where(self, name):
        return f'{f"step {self._step}" if self._step else "before step 1"}: mark_step("{name}")'

    def _report(self, message):
        if self._action == "error":
            raise NewGraph(message)
        tqdm.write(f"warning: {message}", file=sys.stderr)
