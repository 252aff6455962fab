"""Finds the tensors whose recorded operations are the next graph, by Python's garbage collector."""

import gc
from contextlib import contextmanager

from parallel.graph import backend

RECORDED = (
    "is_recorded_constant"  # an attribute of the tensors that recordings hold (replay.py): no program's
)


def live_tensors(devices: int) -> list[list]:
    """The tensors that are alive on each of this process's XLA devices, oldest first.

    Tensors that were alive before the ranks started are frozen and not walked. Tensors are sorted by
    creation, because the collector's order depends on its generations. Garbage is collected here and nowhere
    else: if it were collected between two ranks' calls, a tensor in a reference cycle would be in one rank's
    graph and not in another's.
    """
    import torch

    gc.collect()
    live = [{} for _ in range(devices)]
    for thing in gc.get_objects():
        if not isinstance(thing, torch.Tensor) or not thing.is_xla or hasattr(thing, RECORDED):
            continue
        if backend.is_wrapper(thing):
            for tensor in (thing, thing.grad) if thing.is_leaf and thing.grad is not None else (thing,):
                # The object of a tensor that only C++ holds, such as the base of a view, dies with it. An
                # operation that returns its argument makes it Python's.
                live[thing.device.index][id(tensor)] = tensor.requires_grad_(tensor.requires_grad)
    return [sorted(tensors.values(), key=backend.tensor_id) for tensors in live]


@contextmanager
def collecting_at_mark_steps():
    """Within this context Python collects garbage in live_tensors and nowhere else."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
