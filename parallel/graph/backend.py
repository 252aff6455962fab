"""torch_xla's private calls: the only file that knows them.

Written for torch_xla 2.9. torch_xla is imported at the first call, because its environment has to be set
before.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def _xlac():
    import torch_xla

    return torch_xla._XLAC


def tensor_id(tensor: torch.Tensor) -> int:
    """The number of a tensor on an XLA device. Numbers grow in the order in which tensors are created."""
    return _xlac()._xla_get_tensor_id(tensor)


def are_pending(tensors: Sequence[torch.Tensor]) -> list[bool]:
    """Whether each tensor waits for a mark_step: operations are recorded that were not executed."""
    return _xlac()._check_tensor_need_materialization(tensors)


def pending_outputs(tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The tensors that wait for a mark_step, by output of its graph: those that share their data (as
    x.detach() does with x) are one output."""
    outputs: dict[int, list[torch.Tensor]] = {}
    for tensor, pending in zip(tensors, are_pending(tensors), strict=True):
        if pending:
            outputs.setdefault(tensor_id(tensor), []).append(tensor)
    return list(outputs.values())


def pending_tensors(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """One tensor of each of pending_outputs."""
    return [same[0] for same in pending_outputs(tensors)]


def graph_hash(tensors: Sequence[torch.Tensor]) -> bytes:
    """The hash of the graph that computes the tensors."""
    return _xlac()._get_graph_hash(tensors)


def hlo_text(tensors: Sequence[torch.Tensor]) -> str:
    """The HLO module that computes the tensors, before any optimisation."""
    return _xlac()._get_xla_tensors_hlo(tensors)


def hlo_proto(tensors: Sequence[torch.Tensor]) -> bytes:
    """The same module as a serialised HloModuleProto."""
    return _xlac()._get_xla_tensors_hlo_proto(tensors)


def compile_graph(tensors: Sequence[torch.Tensor]) -> None:
    """Compile the graph that computes the tensors, without executing it."""
    _xlac()._xla_warm_up_cache(tensors, [])


def donates() -> bool:
    """Whether a graph may put its outputs into the memory of inputs: torch_xla reads the same variable."""
    return os.environ.get("XLA_ENABLE_PARAM_ALIASING", "1") not in ("0", "false")


def donate(inputs: Sequence[torch.Tensor]) -> None:
    """Let the next graph that is compiled of these inputs (data of graph_inputs) overwrite them.

    It is part of the graph's hash, and of the compiled graph: whenever that runs, it deletes these inputs.
    Data whose graph is not run must not stay marked: the next sync that reads it would delete it.
    """
    _xlac()._xla_set_enable_alias_with_buffer_donor_config(True)
    for data in inputs:
        _xlac()._set_buffer_donation(data, True)


def multiply_in_full_precision() -> None:
    """Compute products of fp32 in fp32 from here on, where a device would round their factors.

    As torch_xla.backends.set_mat_mul_precision("highest"), which warns of itself.
    """
    _xlac()._xla_set_mat_mul_precision("highest")


def sync() -> None:
    """Compile what is pending on the calling thread's device, if it is new, and start it."""
    import torch_xla

    torch_xla.sync()


def execute_pending(device: torch.device) -> None:
    """As sync, without what torch_xla does for its own statistics."""
    _xlac()._xla_step_marker(str(device), [], False, True)


def record_lines(on: bool) -> None:
    """Whether operations are recorded with their line of Python, which doubles the time of tracing."""
    _xlac()._set_ir_debug(on)


@contextmanager
def without_lines() -> Iterator[None]:
    """Within this context no lines are recorded, and what is compiled has none."""
    on = _xlac()._get_ir_debug()
    record_lines(False)
    yield
    record_lines(on)


def scope(name: str) -> object:
    """Begin a scope of the calling thread, which ends when the object is deleted. While lines are recorded,
    the HLO has the scopes of each operation."""
    return _xlac().profiler.scope_pusher(name)


def random_seed(device: torch.device) -> int:
    """The seed of the random numbers that the next graph draws on the device, before its first draw."""
    return _xlac()._xla_get_rng_seed(str(device))


def end_graph(device: torch.device, seed: int) -> None:
    """What a sync does at its end: draw the next graph's seed from that of this one (torch_xla's
    LazyGraphExecutor::MarkStep), and forget the token that keeps the order of collectives within a graph."""
    _xlac()._xla_set_rng_seed((1012031 + 7012063 * seed) % 2**64, str(device))
    _xlac()._set_all_reduce_token(str(device), None)


def profiler_span(name: str) -> AbstractContextManager:
    """A named span of the calling thread in XLA's profile."""
    return _xlac().profiler.TraceMe(name)


def data_handle(tensor: torch.Tensor) -> int:
    """A number for the data of a tensor that is not pending: tensors with one handle share their data."""
    return _xlac()._unique_id_for_ir_and_data(tensor)


def graph_inputs(tensors: Sequence[torch.Tensor]) -> list[tuple[int, torch.Tensor]]:
    """What the graph of the tensors reads, in the order of its parameters: (tensor_id of its first owner, its
    data)."""
    identities, data = _xlac()._get_tensors_xla_device_data_node(tensors)
    return list(zip(identities, data, strict=True))


def run_compiled(graph: bytes, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Start the compiled graph with this hash; returns its outputs, before the device has computed them.

    Where a device takes no graph before the last one is done, this waits for it: first without Python's lock,
    in a sync that has nothing to do. _run_cached_graph would hold the lock, so that no thread could say where
    this rank is.
    """
    _xlac()._xla_sync_multi(inputs[:1], [], False, True)
    return _xlac()._run_cached_graph(graph, inputs)


def set_data(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Give the first tensor of each pair the data of the second, an output of run_compiled, as an operation
    in place would: its views, and tensors that share its data (x.detach()), have it, too."""
    import torch

    for tensor, output in pairs:
        if tensor._is_view():
            tensor.data = output
    whole = [pair for pair in pairs if not pair[0]._is_view()]
    # A model has hundreds of tensors, and a map is a loop in C.
    tensors = [tensor for tensor, _ in whole]
    outputs = [torch._from_functional_tensor(output) for _, output in whole]
    list(map(torch._functionalize_replace, tensors, outputs))
    list(map(torch._functionalize_commit_update, tensors))
    list(map(torch._functionalize_sync, tensors))


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether this is a tensor of a program, and not what torch_xla wraps in one."""
    import torch

    return torch._is_functional_tensor(tensor)


def count(metric: str) -> int:
    """How often something has happened in this process, by torch_xla's name of the metric."""
    from torch_xla.debug.metrics import metric_data

    data = metric_data(metric)
    return data[0] if data else 0


def is_compiling() -> bool:
    """Whether a graph is being compiled: it is counted as new before, and as compiled afterwards.

    Any thread may ask. It must not import torch_xla: the thread that trains may be about to, or be stuck in
    it.
    """
    xlac = getattr(sys.modules.get("torch_xla"), "_XLAC", None)
    if not xlac:
        return False
    compiled = xlac._xla_metric_data("CompileTime")
    return (xlac._xla_counter_value("UncachedCompile") or 0) > (compiled[0] if compiled else 0)


def reads() -> int:
    """How often values have been copied from devices to the host in this process."""
    return count("TransferFromDeviceTime")


def wait() -> None:
    """Wait until all started graphs of this process are done: before that, handles of their outputs may
    change."""
    import torch_xla.core.xla_model as xla_model

    xla_model.wait_device_ops()
