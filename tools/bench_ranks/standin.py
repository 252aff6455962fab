"""A stand-in for the NeuronCore of a rank: the process path runs on a CPU, and its numbers are right.

What is real: torchrun's variables and store, trainer/main.py from its first line to its last, launch_process,
run_process, the loop, the checkpoint and its files. What stands in, all of it in `install`:

- A rank's device is the CPU, and PyTorch computes at once what a device would be told to compute. A mark_step
  has nothing left to start. So no graph is recorded, compiled, compared or replayed, and the host waits for
  the other ranks inside of a step, where it waits for the device on Trainium.
- torch_xla's collectives are gloo's, between the processes. A collective whose other members have died waits
  for ever, as a device's does: parallel/runtime/watch.py has to end the rank.
- Random numbers, optimizer, rotary embedding, dropout and uploads need nothing: the loop has no other call of
  torch_xla.
"""

import gc
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
import torch_xla
import torch_xla.core.xla_model as xla_model
import torch_xla.runtime as xla_runtime

from parallel import buckets
from parallel.graph import backend
from parallel.runtime import devices, processes

FOREVER = timedelta(days=1)


class StandInRuntime(processes.ProcessRuntime):
    """A rank that is a process, whose device is the CPU.

    `when_created` has functions that are called with the new runtime, `when_stepping` functions that are
    called with the 1-based number of a step that begins.
    """

    when_created: list[Callable[["StandInRuntime"], None]] = []
    when_stepping: list[Callable[[int], None]] = []

    def __init__(self, rank, world_size, device):
        super().__init__(rank, world_size, device)
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
    start = dist.init_process_group
    dist.init_process_group = lambda _, **arguments: start("gloo", timeout=FOREVER, **arguments)
    # model/saved_tensors.py tells by it which tensors it has saved already.
    backend.tensor_id = lambda each: (each.data_ptr(), each.shape, each.stride(), each.dtype)
    backend.are_pending = lambda tensors: [False] * len(tensors)
    # A slice of columns has no strides on an XLA device; buckets.py views it as one row.
    buckets._columns = lambda matrix, start, stop: matrix[:, start:stop].contiguous()
    for each in (all_reduce, all_gather, reduce_scatter, collective_permute, optimization_barrier_):
        setattr(xla_model, each.__name__, each)


def all_reduce(op, tensor, groups, pin_layout):
    """xla_model.all_reduce of one tensor."""
    tensor, op = _copy(tensor), dist.ReduceOp.MAX if op == xla_model.REDUCE_MAX else dist.ReduceOp.SUM
    _wait_for(lambda: dist.all_reduce(tensor, op, _own_group(groups)))
    return tensor


def all_gather(tensor, dim, groups, pin_layout):
    """xla_model.all_gather of one tensor."""
    gathered = [torch.empty_like(tensor).contiguous() for _ in groups[0]]
    _wait_for(lambda: dist.all_gather(gathered, _copy(tensor), _own_group(groups)))
    return torch.cat(gathered, dim)


def reduce_scatter(op, tensor, scale, scatter_dim, shard_count, groups, pin_layout):
    """xla_model.reduce_scatter of one tensor, with a scale of 1; gloo has none of its own."""
    whole = all_reduce(op, tensor, groups, pin_layout)
    place = _own(groups).index(dist.get_rank())
    return whole.chunk(shard_count, scatter_dim)[place].clone()


def collective_permute(tensor, pairs):
    """xla_model.collective_permute of pairs (from, to), in which each rank comes once on either side."""
    rank, sent, received = dist.get_rank(), _copy(tensor), torch.empty_like(tensor).contiguous()
    to, source = dict(pairs)[rank], next(source for source, to in pairs if to == rank)

    def exchange():
        sending = dist.isend(sent, to)
        dist.recv(received, source)
        sending.wait()

    _wait_for(exchange)
    return received


def optimization_barrier_(tensors):
    """xla_model.optimization_barrier_: no compiler merges anything here."""


def _copy(tensor):
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _own(groups):
    rank = dist.get_rank()
    return next(group for group in groups if rank in group)


def _own_group(groups):
    return _group(tuple(_own(groups)))


@cache
def _group(ranks):
    """gloo's group of these ranks, which all of them make at the same collective: their first."""
    if len(ranks) == dist.get_world_size():
        return None
    # torch_xla has replaced dist.new_group.
    return dist.distributed_c10d.new_group(ranks, timeout=FOREVER, use_local_synchronization=True)


def _wait_for(collective):
    try:
        collective()
    except RuntimeError:  # gloo has lost a connection; a device would not notice
        threading.Event().wait()
