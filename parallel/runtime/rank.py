"""One rank's view of where it runs: its device, the barrier of all ranks, and mark_step."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from parallel.graph.guard import Guard
from parallel.runtime.devices import extracts_graphs


class GraphMismatch(RuntimeError):
    """Ranks traced different graphs between two mark_steps."""


class GraphListener:
    """Is told about every mark_step of a rank. Benchmarks and tests derive from it; each method does nothing
    here."""

    def tracing(self, name: str | None) -> None:
        """The rank begins to record the operations of the graph `name`."""

    def traced(self, name: str | None) -> None:
        """All operations are recorded; the graph is about to be compiled, if it is new, and started."""

    def started(self, name: str | None) -> None:
        """The device has been told to execute the graph."""


class Runtime:
    """One rank's view of where it runs: `rank`, `world_size` and `device` (a torch.device).

    `executes` is False where graphs are only collected (extracts_graphs): then what was computed is not true,
    so it must not be written, and no branch may depend on it. `listeners` are told about every mark_step.
    """

    def __init__(self, rank: int, world_size: int, device):
        self.rank, self.world_size, self.device = rank, world_size, device
        self.executes = not extracts_graphs()
        self.listeners: list[GraphListener] = []
        self.guard: Guard | None = None

    def watch_graphs(self, on_recompile: str) -> None:
        """From here on, a named mark_step whose graph changes is a warning (`warn`), an error (`error`) or
        nothing (`ignore`)."""
        watches = self.rank == 0 and on_recompile != "ignore"
        self.guard = Guard(on_recompile, self.compilations) if watches else None

    def begin_step(self, step: int) -> None:
        """The optimizer step with this 1-based number begins: warnings name it."""
        if self.guard:
            self.guard.begin_step(step)

    def barrier(self) -> None:
        """Wait until every rank is here. The host waits; the device does not."""
        raise NotImplementedError

    def share(self, value):
        """Rank 0's `value` on every rank; the others' is not looked at. The host waits, without limit."""
        raise NotImplementedError

    def mark_step(self, name: str | None = None, function: Callable | None = None, *inputs) -> Any:
        """Record `function(*inputs)` as one graph, start to execute it, and return what the function returns.

        Also executes what was recorded before, since the last mark_step. Without a function, only that.
        Returns before the device has finished. `name` is the graph's name in warnings; without one, the graph
        may differ each time.
        """
        for listener in self.listeners:
            listener.tracing(name)
        outputs = function(*inputs) if function else None
        for listener in self.listeners:
            listener.traced(name)
        self._end_graph(name)
        for listener in self.listeners:
            listener.started(name)
        return outputs

    def _end_graph(self, name: str | None) -> None:
        """Start to execute everything that is pending on this rank's device."""
        raise NotImplementedError

    def read(self, tensor) -> list[float]:
        """The values of a tensor [n] of the last mark_step, for which the host waits; zeros where nothing is
        executed."""
        return tensor.cpu().tolist() if self.executes else [0.0] * len(tensor)

    def _execute(self, name, graph, tensors):
        import torch_xla

        with self.guard.compiling(name, graph, tensors) if self.guard else nullcontext():
            torch_xla.sync()

    def compilations(self) -> int:
        """How many graphs this process has compiled so far. On a CPU all ranks live in one process."""
        from torch_xla.debug.metrics import metric_data

        data = metric_data("CompileTime")
        return data[0] if data else 0
