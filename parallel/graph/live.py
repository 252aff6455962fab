"""The tensors whose recordings are the graph to come, found by Python's garbage collector."""

import gc
from contextlib import contextmanager


def live_tensors(devices: int) -> list[list]:
    """The tensors on each of this process's devices, whose recordings are the graph to come; on XLA:CPU, rank
    0 asks for all.

    Python's garbage collector knows them; what was alive before the ranks started is frozen and not walked.
    Sorted by creation, because the collector's order depends on its generations. It collects here and nowhere
    else: a tensor in a cycle of references would be part of one rank's graph and not of another's, if it ran
    between them.
    """
    import torch
    import torch_xla

    gc.collect()
    live = [{} for _ in range(devices)]
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "xla":
            for tensor in (thing, thing.grad) if thing.is_leaf and thing.grad is not None else (thing,):
                live[thing.device.index][torch_xla._XLAC._xla_get_tensor_id(tensor)] = tensor
    return [[tensors[key] for key in sorted(tensors)] for tensors in live]


@contextmanager
def collecting_at_mark_steps():
    """Within, Python collects garbage in live_tensors and nowhere else."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()
