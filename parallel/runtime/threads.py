"""Ranks as threads of one process, each with a virtual device of XLA:CPU.

On XLA:CPU the members of a collective find each other by the executable that they run. So rank 0 compiles
first, and the others find its executable in the cache. A rank that traced another graph would never arrive,
and XLA would abort the process after some seconds. Before anything is executed, mark_step therefore compares
the graphs of all ranks and raises GraphMismatch.
"""

import threading

from parallel.graph import backend
from parallel.graph.live import collecting_at_mark_steps, live_tensors
from parallel.runtime.environment import prepare_environment
from parallel.runtime.rank import GraphMismatch, Runtime


class LockstepBarrier:
    """A barrier of threads that must all arrive from the same call; else it raises GraphMismatch."""

    def __init__(self, world_size: int):
        self.shared = None
        self._calls = [""] * world_size
        self._values, self._turns = [[None] * world_size, [None] * world_size], [0] * world_size
        self._barrier = threading.Barrier(world_size, action=self._check)

    def wait(self, rank: int, call: str) -> None:
        """Wait until all ranks are here; `call` says where this one is, in words."""
        self._calls[rank] = call
        self._barrier.wait()

    def exchange(self, rank: int, call: str, value) -> list:
        """The values that all ranks gave to this call, by rank."""
        # A rank can be one exchange ahead of another, and no more.
        values = self._values[self._turns[rank] % 2]
        self._turns[rank] += 1
        values[rank] = value
        self.wait(rank, call)
        return list(values)

    def abort(self) -> None:
        """End the wait of all, now and later, with threading.BrokenBarrierError."""
        self._barrier.abort()

    def _check(self):
        for rank, call in enumerate(self._calls):
            if call != self._calls[0]:
                raise GraphMismatch(
                    f"rank {rank} is at {call} while rank 0 is at {self._calls[0]}: all ranks must call "
                    "mark_step and barrier equally often and in the same order"
                )


class ThreadRuntime(Runtime):
    """A rank that is a thread with a virtual device of XLA:CPU."""

    def __init__(self, rank, world_size, device, barrier: LockstepBarrier):
        super().__init__(rank, world_size, device)
        self._lockstep = barrier

    def barrier(self):
        self._lockstep.wait(self.rank, "a barrier")

    def share(self, value):
        if self.rank == 0:
            self._lockstep.shared = value
        self._lockstep.wait(self.rank, "something shared")
        value = self._lockstep.shared
        self._lockstep.wait(self.rank, "something shared")  # before rank 0 shares the next
        return value

    def _exchange(self, value):
        return self._lockstep.exchange(self.rank, "an exchange", value)

    def _live(self):
        self._lockstep.wait(self.rank, "a mark_step")
        if self.rank == 0:
            self._lockstep.shared = dict(enumerate(live_tensors(self.world_size)))
        self._lockstep.wait(self.rank, "a mark_step's tensors")
        return self._lockstep.shared.pop(self.rank)

    def _end_graph(self, name, before=None, record=None):
        outputs, pending = self._pending(before)
        graph = backend.graph_hash(pending)
        hashes = self._exchange(graph)
        if self.rank == 0:
            self._check(hashes)
            self._compile(name, graph, pending)
        self._lockstep.wait(self.rank, "a compiled mark_step")
        if pending and self._may_replay(name):
            self._start(graph, outputs, record)
        elif pending and self.rank != 0:
            self._sync()

    def _check(self, hashes):
        odd = [str(rank) for rank, graph in enumerate(hashes) if graph != hashes[0]]
        if odd:
            raise GraphMismatch(
                f"rank{'s' if len(odd) > 1 else ''} {', '.join(odd)} of {self.world_size} traced another "
                "graph than rank 0 before this mark_step. All ranks must run the same operations: what "
                "depends on the rank must be data in a tensor of shape [1] or more, never a Python branch, a "
                "shape or a constant."
            )


def launch_threads(function, world_size: int) -> None:
    """Run `function(runtime)` on `world_size` ranks of this process; raises the first error of any rank."""
    prepare_environment(world_size)
    import torch
    import torch_xla
    import torch_xla.runtime as xla_runtime
    from torch_xla._internal import pjrt
    from torch_xla.core.xla_model import get_xla_supported_devices, set_replication

    barrier = LockstepBarrier(world_size)
    errors: list[BaseException] = []

    def host_rank(_):
        try:
            # This thread's backward stays on this thread's device.
            torch.autograd.set_multithreading_enabled(False)
            device = torch_xla.device()
            set_replication(device, get_xla_supported_devices())
            xla_runtime._init_world_size_ordinal()
            rank = xla_runtime.global_ordinal()
            function(ThreadRuntime(rank, world_size, device, barrier))
            barrier.wait(rank, "the end of its program")
        except threading.BrokenBarrierError:
            pass  # another rank's error ended this one
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    with collecting_at_mark_steps():
        pjrt.spawn_threads(host_rank)
    if errors:
        raise errors[0]
