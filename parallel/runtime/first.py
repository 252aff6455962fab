"""What the first process of a job knows, for all of its processes, before any rank has a device."""

import os
from datetime import timedelta
from functools import cache

from parallel.runtime import devices
from parallel.runtime.watch import of_this_attempt


def from_first_process(name: str, value: str) -> str:
    """The first process's `value` in every process of the job; the others' is not looked at.

    Its first value under a `name` stands. All processes have to call this. Where ranks are threads, there is
    one process.
    """
    if not devices.ranks_are_processes() or os.environ.get("WORLD_SIZE", "1") == "1":
        return value
    store = of_this_attempt(_store())
    if os.environ["RANK"] == "0" and not store.check([name]):
        store.set(name, value)
    store.wait([name], timedelta(days=1))
    return store.get(name).decode()


@cache
def _store():
    """torchrun's key-value store, at which the process group meets later. It lives as long as the process,
    because without torchrun's own agent the first process is the host of it."""
    from torch.distributed import rendezvous

    store, *_ = next(rendezvous("env://"))
    return store
