"""The recompile guard: which graph each place of the loop has, and what changed when it has another.

A graph that is new after the first of its place costs minutes on a NeuronCore, and usually comes from a line
of Python that meant no harm. The guard compares hashes; only a new graph is written as HLO text and compared
with the one that its place had before.

The line where an operation was traced is in that text if Python's frames were recorded, which doubles the
time of tracing. So they are recorded from the start, and from a new graph, until a step has a known graph;
under XLA_IR_DEBUG=1, always.
"""

import os
import sys
from collections.abc import Callable
from contextlib import contextmanager

from tqdm import tqdm

from parallel.graph.difference import difference


class NewGraph(RuntimeError):
    """A place of the loop has another graph than before, under --on_recompile error."""


class Guard:
    """Rank 0's memory of the graphs of one run."""

    def __init__(self, action: str, compilations: Callable[[], int]):
        """action: warn or error. compilations(): how many graphs this process has compiled."""
        import torch_xla

        self._backend, self._action, self._compilations = torch_xla._XLAC, action, compilations
        self._hashes: dict[str, set[bytes]] = {}
        self._texts: dict[str, str] = {}  # the newest graph of each place
        self._step, self._compiled, self._tracing_lines = 0, compilations(), True
        self._backend._set_ir_debug(True)

    @contextmanager
    def compiling(self, place: str | None, step: int | None, graph: bytes, tensors: list):
        """Around the execution of what is pending in `tensors`, whose hash is `graph`, by a mark_step.

        Without a place, nothing is compared. `step` is the 1-based step that the mark_step ends, where it
        ends one.
        """
        if place:
            self._check(place, step, graph, tensors)
        self._backend._set_ir_debug(False)  # a graph must not be another one because its line moved
        yield
        self._compiled = self._compilations()
        self._backend._set_ir_debug(self._tracing_lines or os.environ.get("XLA_IR_DEBUG") == "1")

    def _check(self, place, step, graph, tensors):
        where = (
            f'step {step}: mark_step("{place}")' if step else f'after step {self._step}: mark_step("{place}")'
        )
        cut, self._step = self._compilations() > self._compiled, step or self._step
        seen = self._hashes.setdefault(place, set())
        new, before = graph not in seen, self._texts.get(place)
        if new:
            seen.add(graph)
            self._backend._set_ir_debug(True)  # the text has the lines only where this is on
            self._texts[place] = self._backend._get_xla_tensors_hlo(tensors)
        self._tracing_lines = new or self._tracing_lines and not step
        if cut:
            self._report(
                f"{where}: a graph was compiled before it, because a value was read (.item(), .cpu(), print) that no "
                "mark_step had executed; PT_XLA_DEBUG_LEVEL=1 shows the line"
            )
        elif new and before:
            self._report(f"{where} compiles a new graph: {difference(before, self._texts[place])}")

    def _report(self, message):
        if self._action == "error":
            raise NewGraph(message)
        tqdm.write(f"warning: {message}", file=sys.stderr)
