"""A stand-in for the NeuronCore of a rank: the process path runs on a CPU, and its numbers are right.

What is real: torchrun's variables and store, trainer/main.py from its first line to its last, launch_process,
run_process, the loop, the checkpoint and its files. What stands in, all of it in `install`:

- A rank's device is the CPU, and PyTorch computes at once what a device would be told to compute. A mark_step
  has nothing left to start. So no graph is recorded, compiled, compared or replayed, and the host waits for
  the other ranks inside of a step, where it waits for the device on Trainium.
- torch_xla's collectives are done by the processes themselves, through sockets of this machine. One whose
  other members have died waits for ever, as a device's does: parallel/runtime/watch.py has to end the rank.
- Random numbers, optimizer, rotary embedding, dropout and uploads need nothing: the loop has no other call of
  torch_xla.
"""

import gc
import os
import socket
import threading
from collections.abc import Callable
from functools import reduce

import torch
import torch_xla
import torch_xla.core.xla_model as xla_model
import torch_xla.runtime as xla_runtime

from model.weights.safetensors_file import as_bytes
from parallel import buckets
from parallel.graph import backend
from parallel.runtime import devices, processes
from parallel.runtime.progress import here


class StandInRuntime(processes.ProcessRuntime):
    """A rank that is a process, whose device is the CPU.

    `when_created` has functions that are called with the new runtime, `when_stepping` functions that are
    called with the 1-based number of a step that begins.
    """

    when_created: list[Callable[["StandInRuntime"], None]] = []
    when_stepping: list[Callable[[int], None]] = []

    def __init__(self, rank, world_size, device):
        super().__init__(rank, world_size, device)
        self.barrier()  # ranks have Neuron devices when all of them have
        for each in self.when_created:
            each(self)

    def begin_step(self, step):
        super().begin_step(step)
        for each in self.when_stepping:
            each(step)

    def replay_graphs(self, on):
        super().replay_graphs(False)

    def _end_graph(self, name, before=None, record=None):
        gc.collect()  # as live_tensors: garbage is collected at mark_steps and nowhere else

    def device_memory(self):
        return None

    def compilations(self):
        return 0


def install(rank: int, world_size: int, host: str) -> None:
    """Let this process, which torchrun's variables describe, take the place of a rank on the machine
    `host`."""
    devices.on_neuron = lambda: True
    socket.gethostname = lambda: host
    processes.ProcessRuntime = StandInRuntime
    torch_xla.device = lambda: torch.device("cpu")
    xla_runtime.global_ordinal, xla_runtime.world_size = lambda: rank, lambda: world_size
    # model/saved_tensors.py tells by it which tensors it has saved already.
    backend.tensor_id = lambda each: (each.data_ptr(), each.shape, each.stride(), each.dtype)
    backend.are_pending = lambda tensors: [False] * len(tensors)
    # A slice of columns has no strides on an XLA device; buckets.py views it as one row.
    buckets._columns = lambda matrix, start, stop: matrix[:, start:stop].contiguous()
    # What a device would have is a copy of the part, and not a view that keeps the whole.
    own = buckets.Buckets.own
    buckets.Buckets.own = lambda *arguments: [part.clone() for part in own(*arguments)]
    collectives = Collectives(Wires(rank, os.environ["MASTER_PORT"]))
    for name in ("all_reduce", "all_gather", "reduce_scatter", "collective_permute", "optimization_barrier_"):
        setattr(xla_model, name, getattr(collectives, name))


class Wires:
    """Sockets between this rank and others, made when first needed. Of two ranks the lower one listens."""

    def __init__(self, rank: int, port: str):
        """`port`: of the store, which no other attempt on this machine has."""
        self.rank, self._port, self._made = rank, port, {}
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self._name(rank))
        self._listener.listen(1024)

    def _name(self, rank):
        return f"\0bench_ranks-{self._port}-{rank}"  # Linux forgets it with the process

    def to(self, other: int) -> socket.socket:
        """The socket to another rank."""
        while other not in self._made:
            if other < self.rank:
                wire = self._made[other] = socket.socket(socket.AF_UNIX)
                wire.connect(self._name(other))
                wire.sendall(self.rank.to_bytes(4, "little"))
            else:
                wire, _ = self._listener.accept()
                self._made[int.from_bytes(wire.recv(4, socket.MSG_WAITALL), "little")] = wire
        return self._made[other]

    def send(self, other: int, tensor: torch.Tensor) -> None:
        """Send the bytes of a tensor."""
        try:
            self.to(other).sendall(as_bytes(tensor))
        except OSError:
            _wait_for_ever()

    def receive(self, other: int, tensor: torch.Tensor) -> torch.Tensor:
        """Fill a contiguous tensor with the bytes that another rank sends, and return it."""
        view = as_bytes(tensor)
        with here().waiting("waiting for the device"):
            try:
                while len(view):
                    got = self.to(other).recv_into(view)
                    view = view[got:] if got else _wait_for_ever()
            except OSError:
                _wait_for_ever()
        return tensor


class Collectives:
    """torch_xla's collectives, by their names and with the arguments that parallel/collectives.py gives.

    The first rank of a group collects the tensors of all, combines them in the order of the ranks, and sends
    each its result.
    """

    def __init__(self, wires: Wires):
        self._wires = wires

    def all_reduce(self, op, tensor, groups, pin_layout):
        return self._combine(tensor, self._own(groups), lambda all_: [_reduced(op, all_)] * len(all_))

    def all_gather(self, tensor, dim, groups, pin_layout):
        shape = list(tensor.shape)
        shape[dim] *= len(groups[0])
        return self._combine(
            tensor, self._own(groups), lambda all_: [torch.cat(all_, dim)] * len(all_), shape
        )

    def reduce_scatter(self, op, tensor, scale, scatter_dim, shard_count, groups, pin_layout):
        shape = list(tensor.shape)
        shape[scatter_dim] //= shard_count
        return self._combine(
            tensor, self._own(groups), lambda all_: _reduced(op, all_).chunk(shard_count, scatter_dim), shape
        )

    def collective_permute(self, tensor, pairs):
        source, ring = {to: source for source, to in pairs}, [self._wires.rank]
        while source[ring[-1]] != ring[0]:
            ring.append(source[ring[-1]])
        ring.sort()
        return self._combine(tensor, ring, lambda all_: [all_[ring.index(source[rank])] for rank in ring])

    def optimization_barrier_(self, tensors):
        """Nothing: no compiler merges anything here."""

    def _own(self, groups):
        return next(group for group in groups if self._wires.rank in group)

    def _combine(self, tensor, ranks, combine, shape=None):
        """This rank's one of the tensors `combine`(the tensors of all `ranks`), each of `shape` (default: as
        they are)."""
        first, *others = ranks
        mine = tensor.detach().clone(memory_format=torch.contiguous_format)
        if self._wires.rank != first:
            self._wires.send(first, mine)
            return self._wires.receive(first, mine.new_empty(shape or mine.shape))
        results = combine([mine, *(self._wires.receive(rank, torch.empty_like(mine)) for rank in others)])
        for rank, result in zip(others, results[1:], strict=True):
            self._wires.send(rank, result)
        return results[0]


def _reduced(op, tensors):
    combine = torch.maximum if op == xla_model.REDUCE_MAX else torch.add
    return reduce(lambda total, each: combine(total, each, out=total), tensors)


def _wait_for_ever():
    """What a device does whose peer has gone."""
    threading.Event().wait()
