"""One rank's view of where it runs: its device, the barrier of all ranks, and mark_step."""

from collections.abc import Callable
from contextlib import nullcontext
from threading import Lock
from typing import Any

from parallel.graph import backend
from parallel.graph.guard import Guard
from parallel.runtime.devices import extracts_graphs
from parallel.runtime.progress import Progress


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
    so it must not be written, and no branch may depend on it. `listeners` are told about every mark_step;
    `progress` is the first of them.
    """

    is_opaque_to_replay = True  # parallel/graph/watched.py

    def __init__(self, rank: int, world_size: int, device, progress: Progress | None = None):
        self.rank, self.world_size, self.device = rank, world_size, device
        self.executes = not extracts_graphs()
        self.progress = progress or Progress()
        self.listeners: list[GraphListener | Progress] = [self.progress]
        self.guard: Guard | None = None
        self._uploads = Lock()
        self.replay_graphs(True)

    def watch_graphs(self, on_recompile: str) -> None:
        """From here on, a named mark_step whose graph changes is a warning (`warn`), an error (`error`) or
        nothing (`ignore`)."""
        watches = self.rank == 0 and on_recompile != "ignore"
        self.guard = Guard(on_recompile, self.compilations) if watches else None

    def begin_step(self, step: int) -> None:
        """The optimizer step with this 1-based number begins: warnings and reports name it."""
        self.progress.begin_step(step)
        if self.guard:
            self.guard.begin_step(step)

    def barrier(self) -> None:
        """Wait until every rank is here. The host waits; the device does not."""
        raise NotImplementedError

    def share(self, value):
        """Rank 0's `value` on every rank; the others' is not looked at. The host waits, without limit."""
        raise NotImplementedError

    def mark_step(self, name: str | None = None, function: Callable | None = None, *inputs) -> Any:
        """Execute `function(*inputs)` as one graph; returns what the function returns, before the device has
        finished.

        The function is called, and what it records is compiled, if it is new, and started. Where graphs are
        replayed (replay_graphs) a function whose graph is known is not called: its compiled graph is started
        with the new inputs. What was recorded before, since the last mark_step, is executed, too. Without a
        function, only that. `name` is the graph's name in warnings; without one, the graph may differ each
        time.
        """
        self._tell("tracing", name)
        if self._replays and name and function:
            if backend.donates():
                self._execute_outside()
            seed = backend.random_seed(self.device)
            outputs = self._replay_or_trace(name, function, inputs)
            backend.end_graph(self.device, seed)
            return outputs
        outputs = function(*inputs) if function else None
        self._trace_ends(name)
        return outputs

    def _tell(self, what: str, name: str | None) -> None:
        for listener in self.listeners:
            getattr(listener, what)(name)

    def _trace_ends(self, name, before=None, record=None):
        self._tell("traced", name)
        self._end_graph(name, before, record)
        self._tell("started", name)

    def _replay_or_trace(self, name, function, inputs):
        from parallel.graph.reads import Reads
        from parallel.graph.replay import Recorder
        from parallel.graph.trace import Before, Call, NotReplayable, without_views

        recorder, arguments = self._recorders.setdefault(name, Recorder()), []
        call = Call(function, inputs, arguments)
        if self._all_ranks(recorder.can_replay(call, arguments)):
            self._tell("traced", name)
            outputs = recorder.replay(arguments)
            self._tell("started", name)
            return outputs
        if recorder.banned:
            before = Before(self._live(), arguments) if backend.donates() else None
            outputs = function(*inputs)
            self._trace_ends(name, before)
            return outputs
        live = self._live()
        with self.progress.waiting("waiting for the device"):
            backend.wait()
        before = Before(live, arguments)
        with Reads(recorder.reads_values) as reads:
            result = without_views(function(*inputs))

        def record(graph, pending):
            try:
                if reads.any:
                    recorder.read(reads.where)
                else:
                    recorder.add(call, before.trace(graph, pending, result), pending)
            except NotReplayable as problem:
                recorder.ban(str(problem))

        self._trace_ends(name, before, record)
        self._report(name, recorder)
        return recorder.result(result)

    def _report(self, name, recorder):
        """After a traced call: agree on whether the graph may be replayed, and warn of what was noticed."""
        banned, changed = zip(*self._exchange((recorder.banned, recorder.changed)), strict=True)
        if any(banned):
            recorder.ban(next(filter(None, banned)))
            if self.guard:
                self.guard.traced_always(name, recorder.banned)
        elif any(changed) and self.guard:
            self.guard.noticed(name, next(filter(None, changed)))

    def replay_graphs(self, on: bool) -> None:
        """From here on, whether a named mark_step may start its compiled graph without calling the function
        again."""
        self._replays, self._recorders = on and self.executes, {}
        if self.guard:
            self.guard.traces_rarely = self._replays

    def _live(self) -> list:
        """The tensors that are alive on this rank's device."""
        raise NotImplementedError

    def _exchange(self, value: Any) -> list:
        """The values of all ranks of this process, or of a rank that is a process, its own."""
        return [value]

    def _all_ranks(self, value: bool) -> bool:
        return all(self._exchange(value))

    def _end_graph(self, name: str | None, before: Any = None, record: Callable | None = None) -> None:
        """Start to execute everything that is pending on this rank's device.

        Where the graph may be replayed, `before` (a parallel.graph.trace.Before) chooses which memory it
        overwrites, and `record(its hash, backend.pending_outputs)` is called before it starts.
        """
        raise NotImplementedError

    def upload(self, tensor):
        """The tensor on this rank's device. Unlike tensor.to(device), other threads may call it."""
        with self._uploads:
            return tensor.to(self.device)

    def _execute_outside(self):
        """Execute what was recorded outside of a function: it still reads the data that the function's graph
        may overwrite, and a clone has it, too."""
        before = self.compilations()
        with self._uploads:
            backend.execute_pending(self.device)
        if self.guard:
            self.guard.compiled_outside(self.compilations() - before)

    def _sync(self):
        # torch_xla confuses a tensor that another thread uploads meanwhile: some had the wrong data.
        with self._uploads:
            backend.sync()

    def read(self, tensor) -> list[float]:
        """The values of a tensor [n] of the last mark_step, for which the host waits; zeros where nothing is
        executed."""
        with self.progress.waiting("waiting for the device, to read values"):
            return tensor.cpu().tolist() if self.executes else [0.0] * len(tensor)

    def _compile(self, name: str | None, graph: bytes, pending: list) -> None:
        """Compile the graph of the pending tensors, whose hash is `graph`, if it is new.

        torch_xla compiles and starts a graph in one go where it is never replayed.
        """
        with self.guard.compiling(name, graph, pending) if self.guard else nullcontext():
            if not self._may_replay(name):
                self._sync()
            elif pending:
                backend.compile_graph(pending)

    def _may_replay(self, name: str | None) -> bool:
        """Whether the graph is run as a replay is, for which torch_xla would compile it again."""
        return name in self._recorders

    def _pending(self, before: Any) -> tuple[list[list], list]:
        """(backend.pending_outputs, one tensor of each); `before` is as in _end_graph."""
        live = self._live()
        outputs = backend.pending_outputs(live)
        if before and backend.donates():
            before.donate(live, outputs)
        return outputs, [same[0] for same in outputs]

    def _start(self, graph: bytes, pending: list[list], record: Callable | None) -> None:
        """Start the compiled graph, and give the pending tensors (backend.pending_outputs) its outputs;
        `record` is as in _end_graph."""
        if record:
            record(graph, pending)
        inputs = backend.graph_inputs([same[0] for same in pending])
        outputs = backend.run_compiled(graph, [data for _, data in inputs])
        pairs = [(tensor, output) for same, output in zip(pending, outputs, strict=True) for tensor in same]
        backend.set_data(pairs)

    def device_memory(self) -> tuple[int, int] | None:
        """(bytes of the device's memory in use, the most so far); None where it does not tell, as a CPU."""
        import torch_xla.core.xla_model as xla_model

        try:
            found = xla_model.get_memory_info(self.device)
            return found["bytes_used"], found["peak_bytes_used"]
        except (RuntimeError, KeyError):
            return None

    def compilations(self) -> int:
        """How many graphs this process has compiled so far. On a CPU all ranks live in one process."""
        return backend.count("CompileTime")
