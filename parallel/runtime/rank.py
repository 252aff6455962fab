"""One rank's view of where it runs."""

from contextlib import nullcontext

from parallel.graph.guard import Guard
from parallel.runtime.devices import extracts_graphs


class GraphMismatch(RuntimeError):
    """Ranks traced different graphs between two mark_steps."""


class Runtime:
    """One rank's view of where it runs: `rank`, `world_size` and `device` (a torch.device).

    `executes` is False where graphs are only collected (extracts_graphs): what was computed is not true, so it may not be
    written, and no branch may depend on it.
    """

    def __init__(self, rank: int, world_size: int, device):
        self.rank, self.world_size, self.device = rank, world_size, device
        self.executes = not extracts_graphs()
        self._guard: Guard | None = None

    def watch_graphs(self, on_recompile: str) -> None:
        """From here on, a named mark_step whose graph changes is a warning (`warn`), an error (`error`) or nothing (`ignore`)."""
        self._guard = (
            Guard(on_recompile, self.compilations) if self.rank == 0 and on_recompile != "ignore" else None
        )

    def barrier(self) -> None:
        """Wait until every rank is here. The host waits; the device does not."""
        raise NotImplementedError

    def share(self, value):
        """Rank 0's `value` on every rank; the others' is not looked at. The host waits, without limit."""
        raise NotImplementedError

    def mark_step(self, place: str | None = None, step: int | None = None) -> None:
        """End the graph traced since the last call, and start to execute it. Returns before the device has finished.

        `place` is the name under which watch_graphs compares it with the graph before; `step`, the step that this ends, if any.
        """
        raise NotImplementedError

    def read(self, tensor) -> list[float]:
        """The values of a tensor [n] of the last mark_step, for which the host waits; zeros where nothing is executed."""
        return tensor.cpu().tolist() if self.executes else [0.0] * len(tensor)

    def _execute(self, place, step, graph, tensors):
        import torch_xla

        with self._guard.compiling(place, step, graph, tensors) if self._guard else nullcontext():
            torch_xla.sync()

    def compilations(self) -> int:
        """How many graphs this process has compiled so far (all ranks of a CPU run live in one process)."""
        from torch_xla.debug.metrics import metric_data

        data = metric_data("CompileTime")
        return data[0] if data else 0
