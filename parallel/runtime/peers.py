"""The processes of a job: what they tell each other through a store, before any rank has a device."""

import json
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any

from parallel.runtime import devices
from parallel.runtime.environment import started_by_torchrun
from parallel.runtime.watch import of_this_attempt

FOREVER = timedelta(days=1)


class Peers:
    """One process's view of the processes of its job. Where ranks are threads, there is one process.

    Values are what JSON can hold. Every method but `name_of` has to be called by all processes, in the same
    order, each time with another `name`. They wait without limit: parallel/runtime/watch.py ends this process
    where another one has failed.
    """

    def __init__(self, store, rank: int, world_size: int, local_rank: int, host: str):
        """store: a torch.distributed.Store; None where there is one process."""
        self.store, self.rank, self.world_size, self.local_rank = store, rank, world_size, local_rank
        self.host = host
        self.looks: list[Any] = []  # whose look(store) the thread of parallel/runtime/watch.py calls
        if store:
            store.set(f"process/{rank}", json.dumps({"host": host, "pid": os.getpid()}))

    @property
    def is_first(self) -> bool:
        """Whether this is the first process of the job."""
        return self.rank == 0

    @property
    def is_first_on_node(self) -> bool:
        """Whether this is the first process of its machine."""
        return self.local_rank == 0

    def name_of(self, rank: int) -> str:
        """`rank 3 on HOST`; without the host where the process has not come yet."""
        if rank == self.rank or not self.store:  # threads of one process
            return f"rank {rank} on {self.host}"
        key = f"process/{rank}"
        return f"rank {rank} on {self._get(key)['host']}" if self.store.check([key]) else f"rank {rank}"

    def share(self, name: str, value: Any) -> Any:
        """The first process's `value` in every process; the others' is not looked at. Its first value under a
        `name` stands."""
        if self.world_size == 1:
            return value
        return self._share(f"share/{name}", value, self.is_first)

    def share_on_node(self, name: str, value: Any) -> Any:
        """The value of the first process of each machine, in all processes of that machine."""
        if self.world_size == 1:
            return value
        first = self.rank - self.local_rank
        return self._share(f"share/{name}/{first}", value, self.is_first_on_node)

    def gather(self, name: str, value: Any) -> list:
        """The values of all processes, by rank."""
        if self.world_size == 1:
            return [value]
        self.store.set(f"gather/{name}/{self.rank}", json.dumps(value))
        keys = [f"gather/{name}/{rank}" for rank in range(self.world_size)]
        together = f"gather/{name}"
        if self.is_first:  # so that each process gets one value and not all of them
            self.store.wait(keys, FOREVER)
            self.store.set(together, json.dumps([self._get(key) for key in keys]))
        self.store.wait([together], FOREVER)
        return self._get(together)

    def agree(self, name: str, value: Any, differ: Callable[[str, Any, Any], str]) -> None:
        """Raise ValueError unless all processes have the same value.

        differ(name of a rank with its host, its value, the first process's) says what differs, in words.
        """
        values = self.gather(name, value)
        odd = [rank for rank, each in enumerate(values) if each != values[0]]
        if odd:
            others = f"; so do {len(odd) - 1} more ranks" if len(odd) > 1 else ""
            raise ValueError(differ(self.name_of(odd[0]), values[odd[0]], values[0]) + others)

    def barrier(self, name: str) -> None:
        """Wait until all processes are here."""
        self.gather(name, None)

    def _share(self, key: str, value: Any, gives: bool) -> Any:
        if gives and not self.store.check([key]):
            self.store.set(key, json.dumps(value))
        self.store.wait([key], FOREVER)
        return self._get(key)

    def _get(self, key: str) -> Any:
        return json.loads(self.store.get(key))


@cache
def meet() -> Peers:
    """This process's view of its job, once and for all.

    The store is torchrun's, at which the process group meets later. It lives as long as the process, because
    without torchrun's own agent the first process is the host of it.
    """
    if not devices.ranks_are_processes() or not started_by_torchrun() or os.environ["WORLD_SIZE"] == "1":
        return Peers(None, 0, 1, 0, socket.gethostname())
    from torch.distributed import rendezvous

    store, rank, world_size = next(rendezvous("env://"))
    local_rank = int(os.environ["LOCAL_RANK"])
    return Peers(of_this_attempt(store), rank, world_size, local_rank, socket.gethostname())
