"""The processes of a job: what they tell each other through a store, before any rank has a device."""

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import groupby
from typing import Any

from parallel.runtime import devices
from parallel.runtime.environment import started_by_torchrun
from parallel.runtime.progress import here
from parallel.runtime.watch import of_this_attempt

REPORT_SECONDS, AGAIN_SECONDS = 30.0, 60.0  # of waiting, until the first line about it, and between two
LONGEST_PAUSE = 0.5  # seconds between two looks, of which a thousand processes make few enough
WAITS = "waits"  # what a process does that is not the reason why others wait


class SharedError(ValueError):
    """An error that all processes of a job raise, with the same message."""


class Peers:
    """One process's view of the processes of its job. Where ranks are threads, there is one process.

    Values are what JSON can hold. Every method has to be called by all processes, in the same order, each
    time with another `name`, a step of the start in words; exceptions say so. A process that waits for one
    that has failed is ended by parallel/runtime/watch.py. The first process of a machine says for whom it
    waits. After `limit_seconds` of waiting for processes of which none says that it is at work (`doing`) the
    wait is a ValueError that names them.
    """

    limit_seconds = 15 * 60.0

    def __init__(
        self,
        store,
        rank: int,
        world_size: int,
        local_rank: int,
        host: str,
        local_world_size: int = 1,
        address: str = "",
    ):
        """store: a torch.distributed.Store; None where there is one process. `address` says where it is."""
        self.store, self.rank, self.world_size, self.local_rank = store, rank, world_size, local_rank
        self.host, self.local_world_size, self.address = host, local_world_size, address
        self._does = ""
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

    @property
    def first_on_node_rank(self) -> int:
        """The rank of the first process of this machine."""
        return self.rank - self.local_rank

    def name_of(self, rank: int) -> str:
        """`rank 3 on HOST`; without the host where the process has not come yet. Any process may call it."""
        mine = rank == self.rank or not self.store  # threads of one process
        host = self.host if mine else self._host_of(rank)
        return f"rank {rank} on {host}" if host else f"rank {rank}"

    def share(self, name: str, value: Any) -> Any:
        """The first process's `value` in every process; the others' is not looked at. Its first value under a
        `name` stands. A process that does not need it need not call this."""
        return self.first(name, lambda: value)

    def first(self, name: str, make: Callable[[], Any]) -> Any:
        """What make() returns in the first process, which alone calls it, in every process."""
        return make() if self.world_size == 1 else self._from(0, name, f"share/{name}", make)

    def first_on_node(self, name: str, make: Callable[[], Any]) -> Any:
        """What make() returns in the first process of each machine, in all processes of that machine."""
        if self.world_size == 1:
            return make()
        first = self.first_on_node_rank
        return self._from(first, name, f"share/{name}/{first}", make)

    def collect(self, name: str, value: Any) -> list | None:
        """In the first process the values of all, by rank; None in the others, which do not wait."""
        if self.world_size == 1:
            return [value]
        keys = {rank: f"gather/{name}/{rank}" for rank in range(self.world_size)}
        self.store.set(keys[self.rank], json.dumps(value))
        if not self.is_first:
            return None
        self._wait(name, keys)
        return [json.loads(each) for each in self.store.multi_get(list(keys.values()))]

    def gather(self, name: str, value: Any) -> list:
        """The values of all processes, by rank."""
        together = self.collect(name, value)  # so that each process gets one value and not all of them
        return self.share(name, together)

    def agree(self, name: str, value: Any, differ: Callable[[str, Any, Any], str]) -> None:
        """Raise SharedError unless all processes have the same value.

        differ(name of a rank with its host, its value, the first process's) says what differs, in words.
        """
        values, problem = self.collect(name, value), None
        odd = [rank for rank, each in enumerate(values or ()) if each != values[0]]
        if odd:
            others = f" ({len(odd) - 1} more ranks differ)" if len(odd) > 1 else ""
            problem = differ(self.name_of(odd[0]), values[odd[0]], values[0]) + others
        self.raise_together(name, problem)

    def raise_together(self, name: str, problem: str | None) -> None:
        """Raise SharedError with the first process's `problem`, in all processes, unless it is None."""
        if problem := self.share(f"{name}: problem", problem):
            raise SharedError(problem)

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Within this context those who wait for this process may read what it does: `tokenizes DATA`. Any
        process may enter it."""
        before = self._does
        self._set_doing(what)
        try:
            yield
        finally:
            self._set_doing(before)

    def _from(self, rank: int, name: str, key: str, make: Callable[[], Any]) -> Any:
        """The value that process `rank` makes under a `key`."""
        if rank != self.rank:
            self._wait(name, {rank: key})
        elif not self.store.check([key]):
            self.store.set(key, json.dumps(make()))
        return json.loads(self.store.get(key))

    def _wait(self, name: str, keys: dict[int, str]) -> None:
        """Wait for the values that processes set, {rank: key}.

        It looks again and again: a wait within the store could not say who is late, and would warn of itself.
        """
        if self.store.check(list(keys.values())):
            return
        with self.doing(WAITS), here().waiting(f"waiting for others: {name}"):
            if self._look_until_there(name, keys):
                say(f"all have come ({name})")

    def _look_until_there(self, name: str, keys: dict[int, str]) -> bool:
        """Returns whether it has said who is late."""
        # The first process is the one that sees who is late.
        patience = self.limit_seconds * (1 if self.is_first else 1.5)
        limit = patience
        begun, report, said = time.monotonic(), REPORT_SECONDS, False
        while not self.store.check(list(keys.values())):
            waited = time.monotonic() - begun
            if waited >= min(report, limit):
                late = {rank: self._doing(rank) for rank, key in keys.items() if not self.store.check([key])}
                working = any(doing and not (self.is_first and doing == WAITS) for doing in late.values())
                if late and waited >= limit and not working:
                    raise ValueError(
                        f"after {waited / 60:.2g} minutes of waiting: {self._describe(late, name)}"
                    )
                at_work = self.is_first_on_node and any(doing not in ("", WAITS) for doing in late.values())
                if late and waited >= report and (self.is_first or at_work):
                    say(f"waiting for {self._describe(late, name)}")
                    said = True
                report = report if waited < report else waited + AGAIN_SECONDS
                limit = waited + patience if working else limit
            time.sleep(min(LONGEST_PAUSE, 0.001 + waited / 10))
        return said

    def _describe(self, late: dict[int, str], name: str) -> str:
        """Ranks with their hosts, and what is known of them; those that wait themselves only where all do."""
        states: dict[str, list[int]] = {}
        causes = {rank: doing for rank, doing in late.items() if doing != WAITS} or late
        for rank, doing in causes.items():
            host = self._host_of(rank)
            state = f" on {host}" + (f", which {doing}" if doing not in ("", WAITS) else f": {name}")
            if not host:
                state = f" (machine {rank // self.local_world_size}): not started yet"
            states.setdefault(state, []).append(rank)
        return "; ".join(ranks_in_words(ranks) + state for state, ranks in states.items())

    def _host_of(self, rank: int) -> str | None:
        key = f"process/{rank}"
        return json.loads(self.store.get(key))["host"] if self.store.check([key]) else None

    def _set_doing(self, what: str) -> None:
        self._does = what
        if self.store:
            self.store.set(f"doing/{self.rank}", what)
            here().at(what or "starting", slow=True)

    def _doing(self, rank: int) -> str:
        key = f"doing/{rank}"
        return self.store.get(key).decode() if self.store.check([key]) else ""


def ranks_in_words(ranks: Iterable[int]) -> str:
    """`rank 7`, or `ranks 0-6, 8`. The ranks are in order."""
    ranks = list(ranks)
    runs = []
    for _, run in groupby(enumerate(ranks), lambda item: item[1] - item[0]):
        run = [rank for _, rank in run]
        runs.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]))
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(runs)}"


def say(text: str) -> None:
    """Print on stderr, at once."""
    print(text, file=sys.stderr, flush=True)


@cache
def meet() -> Peers:
    """This process's view of its job, once and for all. Raises ValueError where the store is not found.

    The store is torchrun's, at which the process group meets later. It lives as long as the process, because
    without torchrun's own agent the first process is the host of it.
    """
    host = socket.gethostname()
    if not devices.ranks_are_processes() or not started_by_torchrun() or os.environ["WORLD_SIZE"] == "1":
        return Peers(None, 0, 1, 0, host)
    from torch.distributed import DistNetworkError, TCPStore

    numbers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    rank, world_size, local_rank, local_world_size, port = (int(os.environ[name]) for name in numbers)
    address, agent = os.environ["MASTER_ADDR"], os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        # Unlike torch's rendezvous it does not wait here until all processes have come, without a word.
        store = TCPStore(
            address,
            port,
            is_master=rank == 0 and not agent,
            timeout=timedelta(seconds=Peers.limit_seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except DistNetworkError as error:
        raise ValueError(
            f"rank {rank} on {host} does not reach the store at {address}:{port} "
            f"(MASTER_ADDR, MASTER_PORT): {str(error).splitlines()[0]}"
        ) from None
    return Peers(
        of_this_attempt(store), rank, world_size, local_rank, host, local_world_size, f"{address}:{port}"
    )
