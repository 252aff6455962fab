"""Ranks as processes, each with a NeuronCore or a GPU."""

import pickle
from collections.abc import Callable
from datetime import timedelta

from parallel.graph import backend
from parallel.graph.live import collecting_at_mark_steps, live_tensors
from parallel.runtime import devices, gpu
from parallel.runtime.environment import started_by_torchrun
from parallel.runtime.progress import here
from parallel.runtime.rank import Runtime
from parallel.runtime.watch import of_this_attempt, watch_job


class ProcessRuntime(Runtime):
    """A rank that is a process with a NeuronCore or a GPU."""

    _barriers = _shared = 0

    def __init__(self, rank, world_size, device):
        super().__init__(rank, world_size, device, here())

    @property
    def store(self):
        """The key-value store of the processes of all nodes, which needs no device."""
        from torch.distributed.distributed_c10d import _get_default_store

        return of_this_attempt(_get_default_store())

    def barrier(self):
        # Through the process group's store: torch_xla's rendezvous would run a graph of its own on the
        # device.
        store, self._barriers = self.store, self._barriers + 1
        name = f"barrier-{self._barriers}"
        if store.add(name, 1) == self.world_size:
            store.set(f"{name}-complete", "")
        with self.progress.waiting("at a barrier"):
            store.wait([f"{name}-complete"], timedelta(days=1))

    def share(self, value):
        store, self._shared = self.store, self._shared + 1
        name = f"shared-{self._shared}"
        if self.rank == 0:
            store.set(name, pickle.dumps(value))
        with self.progress.waiting("waiting for what rank 0 shares"):
            store.wait([name], timedelta(days=1))
        return pickle.loads(store.get(name))

    def _live(self):
        return live_tensors(1)[0]

    def _end_graph(self, name, before=None, record=None):
        outputs, pending = self._pending(before)
        graph = backend.graph_hash(pending) if self.guard or self._may_replay(name) else b""
        self._compile(name, graph, pending)
        if pending and self._may_replay(name):
            self._start(graph, outputs, record)


def launch_process(function: Callable[[Runtime], object]) -> None:
    """Run `function(runtime)` on the rank that this process is; torchrun has started one for each, or there
    is one on a GPU."""
    import torch.distributed
    import torch_xla
    import torch_xla.distributed.xla_backend  # noqa: F401  (registers the backend "xla")
    import torch_xla.runtime as xla_runtime

    if devices.on_gpu():
        gpu.register()
    # Without torchrun there is nobody to meet; a platform's RANK and WORLD_SIZE are a machine's.
    alone = {"store": torch.distributed.HashStore(), "rank": 0, "world_size": 1}
    meets = not devices.on_gpu() or started_by_torchrun()
    torch.distributed.init_process_group("xla", **({} if meets else alone))
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    # Replica groups are numbered by the device's place, and processes meet by torchrun's: they must be the
    # same.
    position = xla_runtime.global_ordinal(), xla_runtime.world_size()
    if position != (rank, world_size):
        raise OSError(
            f"torchrun made this process rank {rank} of {world_size}, and its device is number "
            f"{position[0]} of "
            f"{position[1]}: start the program by torchrun alone, without NEURON_PJRT_* variables of "
            "another launcher"
        )
    with collecting_at_mark_steps():
        run_process(function, ProcessRuntime(rank, world_size, torch_xla.device()))


def run_process(function: Callable[[Runtime], object], runtime: ProcessRuntime) -> None:
    """Run `function(runtime)` in an existing process group. An error or a killed process ends all ranks."""
    watch = watch_job()
    runtime.progress.at("before its first graph", slow=True)  # it reads the weights
    with watch.telling(), gpu.naming_memory():
        function(runtime)
    watch.stop()
    runtime.barrier()
