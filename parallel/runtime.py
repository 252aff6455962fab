"""Where ranks live: a process each on Neuron, a thread each of one process on XLA:CPU.

`launch(function, world_size)` runs `function(runtime)` once a rank. The same function runs in both worlds; what differs is
here: how a rank finds its device, what a barrier is, and how a traced graph is cut off and executed (`mark_step`).

XLA:CPU lets the members of a collective meet by the executable that they run. So rank 0 compiles first and the others find its
executable in the cache; a rank that traced another graph would never arrive, and XLA would abort the process after some
seconds. `mark_step` compares the graphs of all ranks before anything is executed and raises GraphMismatch instead.
"""
import importlib.util
import os
import pickle
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta

from parallel.live import collecting_at_mark_steps, live_tensors
from parallel.recompile import Guard
from parallel.watch import Watch, of_this_attempt


class GraphMismatch(RuntimeError):
    """Ranks traced different graphs between two mark_steps."""


def on_neuron() -> bool:
    """Whether this machine's ranks are NeuronCores: the Neuron SDK is installed and PJRT_DEVICE does not say CPU."""
    return importlib.util.find_spec("torch_neuronx") is not None and os.environ.get("PJRT_DEVICE", "NEURON") == "NEURON"


def extracts_graphs() -> bool:
    """Whether neuron_parallel_compile runs this program to collect its graphs: nothing is executed, every result is garbage."""
    return os.environ.get("NEURON_EXTRACT_GRAPHS_ONLY") == "1"


def leaves_at_once() -> bool:
    """Whether this process has nothing to do: under torchrun on a CPU, local rank 0 hosts the ranks of all others.

    Needs no torch: the processes that leave do so before they import anything heavy.
    """
    if on_neuron() or "LOCAL_RANK" not in os.environ:
        return False
    if os.environ.get("WORLD_SIZE") != os.environ.get("LOCAL_WORLD_SIZE"):
        raise ValueError("several nodes need Neuron devices: XLA:CPU's ranks live in one process; use one node")
    return os.environ["LOCAL_RANK"] != "0"


def requested_world_size(flag: int | None) -> int:
    """The number of ranks: torchrun's WORLD_SIZE where it started us, else --world_size, else 1."""
    started = os.environ.get("WORLD_SIZE")
    if started is None:
        return flag or 1
    if flag and flag != int(started):
        raise ValueError(f"--world_size {flag} contradicts torchrun, which started {started} ranks: leave the flag out")
    return int(started)


def use_huge_pages() -> None:
    """On XLA:CPU, start this process anew with glibc's large allocations in huge pages, unless it runs so; before any import
    that is slow. A step allocates and frees hundreds of megabytes, and without them spends a tenth of its time on page faults."""
    if not on_neuron() and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def prepare_environment(world_size: int, stochastic_rounding: bool = False) -> None:
    """Set what XLA:CPU needs for `world_size` virtual devices, and Neuron to round at random. Before torch_xla is imported."""
    if on_neuron():
        if stochastic_rounding:
            os.environ["NEURON_RT_STOCHASTIC_ROUNDING_EN"] = "1"
        return
    if stochastic_rounding:
        print("warning: --stochastic_rounding needs NeuronCores. This CPU rounds to the nearest bfloat16, so updates that are "
              "small beside their weight are lost: leave the flag out here to train with fp32 master weights.", file=sys.stderr)
    # Measured on torch_xla 2.9: fewer threads than ranks that wait in a collective is a deadlock, and with donated buffers the
    # first rank's sync waits for the others.
    os.environ |= {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(world_size), "NPROC": str(4 * world_size),
                   "XLA_THREAD_POOL_SIZE": str(4 * world_size), "XLA_ENABLE_PARAM_ALIASING": "0"}
    # Level 3, the default, unrolls every small loop: it compiled a LoRA step nine times as long, which ran as fast.
    if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=2").strip()
    # torch_xla would take torchrun's variables for a world of processes, and ours is one.
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)


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
        self._guard = Guard(on_recompile, self.compilations) if self.rank == 0 and on_recompile != "ignore" else None

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


class Meeting:
    """A barrier of threads that must all come to it from the same place; GraphMismatch where they do not."""

    def __init__(self, world_size: int):
        self.shared = None
        self._places = [""] * world_size
        self._barrier = threading.Barrier(world_size, action=self._check)

    def wait(self, rank: int, place: str) -> None:
        self._places[rank] = place
        self._barrier.wait()

    def abort(self) -> None:
        """End the wait of all, now and later, with threading.BrokenBarrierError."""
        self._barrier.abort()

    def _check(self):
        for rank, place in enumerate(self._places):
            if place != self._places[0]:
                raise GraphMismatch(f"rank {rank} is at {place} while rank 0 is at {self._places[0]}: all ranks must call "
                                    "mark_step and barrier equally often and in the same order")


class ThreadRuntime(Runtime):
    """A rank that is a thread with a virtual device of XLA:CPU."""

    def __init__(self, rank, world_size, device, meeting: Meeting):
        super().__init__(rank, world_size, device)
        self._meeting = meeting

    def barrier(self):
        self._meeting.wait(self.rank, "a barrier")

    def share(self, value):
        if self.rank == 0:
            self._meeting.shared = value
        self._meeting.wait(self.rank, "something shared")
        value = self._meeting.shared
        self._meeting.wait(self.rank, "something shared")       # before rank 0 shares the next
        return value

    def mark_step(self, place=None, step=None):
        import torch_xla
        self._meeting.wait(self.rank, "a mark_step")
        if self.rank == 0:
            self._compile_first(place, step)
        self._meeting.wait(self.rank, "a compiled mark_step")
        if self.rank != 0:
            torch_xla.sync()

    def _compile_first(self, place, step):
        import torch_xla
        live = live_tensors(self.world_size)
        hashes = [torch_xla._XLAC._get_graph_hash(tensors) for tensors in live]
        odd = [rank for rank, graph in enumerate(hashes) if graph != hashes[0]]
        if odd:
            raise GraphMismatch(
                f"rank{'s' if len(odd) > 1 else ''} {', '.join(map(str, odd))} of {self.world_size} traced another graph than "
                "rank 0 before this mark_step. All ranks must run the same operations: what depends on the rank must be data "
                "in a tensor of shape [1] or more, never a Python branch, a shape or a constant.")
        self._execute(place, step, hashes[0], live[0])


class ProcessRuntime(Runtime):
    """A rank that is a process with a NeuronCore."""

    _barriers = _shared = 0

    @property
    def store(self):
        """What the processes of all nodes tell each other through, without the device."""
        from torch.distributed.distributed_c10d import _get_default_store
        return of_this_attempt(_get_default_store())

    def barrier(self):
        # Through the process group's store, not torch_xla's rendezvous, which would run a graph of its own on the device.
        store, self._barriers = self.store, self._barriers + 1
        name = f"barrier-{self._barriers}"
        if store.add(name, 1) == self.world_size:
            store.set(f"{name}-complete", "")
        store.wait([f"{name}-complete"], timedelta(days=1))

    def share(self, value):
        store, self._shared = self.store, self._shared + 1
        name = f"shared-{self._shared}"
        if self.rank == 0:
            store.set(name, pickle.dumps(value))
        store.wait([name], timedelta(days=1))
        return pickle.loads(store.get(name))

    def mark_step(self, place=None, step=None):
        import torch_xla
        [tensors] = live_tensors(1)        # on every rank: it also collects garbage, and all must do so at the same place
        graph = torch_xla._XLAC._get_graph_hash(tensors) if self._guard else b""
        self._execute(place, step, graph, tensors)


def launch(function: Callable[[Runtime], object], world_size: int) -> None:
    """Run `function(runtime)` on every rank; the first error of any rank ends the others and is raised here."""
    if on_neuron():
        _launch_process(function)
    else:
        _launch_threads(function, world_size)


def _launch_process(function):
    import torch.distributed
    import torch_xla
    import torch_xla.distributed.xla_backend  # noqa: F401  (registers the backend "xla")
    import torch_xla.runtime as xla_runtime
    torch.distributed.init_process_group("xla")
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    place = xla_runtime.global_ordinal(), xla_runtime.world_size()
    if place != (rank, world_size):     # replica groups are numbered by the one, processes meet by the other
        raise OSError(f"torchrun made this process rank {rank} of {world_size}, and its device is number {place[0]} of "
                      f"{place[1]}: start the program by torchrun alone, without NEURON_PJRT_* variables of another launcher")
    with collecting_at_mark_steps():
        run_process(function, ProcessRuntime(rank, world_size, torch_xla.device()))


def run_process(function: Callable[[Runtime], object], runtime: ProcessRuntime) -> None:
    """Run `function(runtime)` in a process group that exists; an error, or a killed process, ends all ranks."""
    watch = Watch(runtime.store.clone(), runtime.rank)
    try:
        function(runtime)
    except BaseException as error:
        watch.tell(error)
        raise
    watch.stop()
    runtime.barrier()


def _launch_threads(function, world_size):
    prepare_environment(world_size)
    import torch
    import torch_xla
    import torch_xla.runtime as xla_runtime
    from torch_xla._internal import pjrt
    from torch_xla.core.xla_model import get_xla_supported_devices, set_replication

    meeting = Meeting(world_size)
    errors: list[BaseException] = []

    def host_rank(_):
        try:
            torch.autograd.set_multithreading_enabled(False)    # this thread's backward stays on this thread's device
            device = torch_xla.device()
            set_replication(device, get_xla_supported_devices())
            xla_runtime._init_world_size_ordinal()
            rank = xla_runtime.global_ordinal()
            function(ThreadRuntime(rank, world_size, device, meeting))
            meeting.wait(rank, "the end of its program")
        except threading.BrokenBarrierError:
            pass                                                # another rank's error ended this one
        except BaseException as error:
            errors.append(error)
            meeting.abort()

    with collecting_at_mark_steps():
        pjrt.spawn_threads(host_rank)
    if errors:
        raise errors[0]

