"""A rank that is a process ends soon after another one has failed or died: it would wait for it for ever."""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

KEY = "failed"
SECONDS = 1.0  # between two looks


def children(parent: int) -> set[int]:
    """The process numbers of a parent's children that are alive."""
    alive = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # A name is cut after 15 bytes, which may be within a character.
            state, number, *_ = path.read_text(errors="replace").rsplit(")", 1)[1].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(number) == parent and state not in "ZX":
            alive.add(int(path.parent.name))
    return alive


def of_this_attempt(store):
    """The store, with names of this attempt's own: torchrun may give the same one to the processes that it
    starts again."""
    from torch.distributed import PrefixStore

    return PrefixStore(f"markstep/attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


class Watch:
    """A thread that looks whether another process of the job has failed: because it was told so, or, on this
    machine, because a process is gone. It ends this process with status 1; one process a machine says why.

    peers: parallel.runtime.peers.Peers. The thread has a connection to the store of its own: a wait of
    another thread would keep it waiting. Once a second it calls look(store) of each of `peers.looks`, too,
    which must not wait. Where there is one process, nothing is watched.
    """

    def __init__(self, peers):
        self._peers, self._stopped, self._ending = peers, threading.Event(), threading.Lock()
        self._parent, self._pids = os.getppid(), {}
        if peers.store:
            self._store = peers.store.clone()
            threading.Thread(target=self._look, daemon=True).start()

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Within this context the other processes are told of an error of this one. Where they have had the
        same error, or it is that the store is lost, this process ends here."""
        try:
            yield
        except BaseException as error:
            if self._peers.store and not self._stopped.is_set():
                self._tell(error)
            raise

    def in_words(self, error: BaseException) -> str:
        """The error's message, after the rank and the host that have it where there are several."""
        from parallel.runtime.peers import SharedError

        message = str(error) or type(error).__name__
        shared = not self._peers.store or isinstance(error, SharedError)
        return message if shared else f"{self._me}: {message}"

    def terminated(self, *_) -> None:
        """The handler of SIGTERM until the ranks are launched: it ends this process, after it has told the
        others why. torchrun sends it at once where a process of this machine has died."""
        try:
            killed = self._killed(of_those_here=True) or f"{self._me} was told to end (SIGTERM)"
            self._end(self._store.compare_set(KEY, "", killed).decode(), 143)
        except RuntimeError as error:
            self._lost(error)

    def stop(self) -> None:
        """Look no longer. To be called before a barrier, after which ranks may end."""
        self._stopped.set()

    @property
    def _me(self) -> str:
        return self._peers.name_of(self._peers.rank)

    def _tell(self, error: BaseException) -> None:
        from torch.distributed import DistNetworkError

        from parallel.runtime.peers import SharedError

        if isinstance(error, DistNetworkError):
            self._lost(error)
        self._stopped.set()
        shared = isinstance(error, SharedError)
        message = " ".join(str(error).split())[:500] or type(error).__name__
        mine = message if shared else f"{self._me} has failed: {message}"
        try:
            told = self._store.compare_set(KEY, "", mine).decode()
            # The store may end with this process: the others read it first.
            time.sleep(1.2 * SECONDS)
            if shared and not self._first_here():
                os._exit(1)
            if told != mine and told.endswith(f" has failed: {message}"):
                self._end(told)
        except RuntimeError as lost:
            self._lost(lost)

    def _look(self):
        while not self._stopped.wait(SECONDS):
            try:
                failure = self._failure()
                if not failure:
                    for each in self._peers.looks:
                        each.look(self._store)
                    continue
                # So that the one that failed is the first to end, and its error the first to be shown.
                time.sleep(2 * SECONDS)
                if not self._stopped.is_set():
                    self._end(failure)
            except RuntimeError as error:
                if not self._stopped.is_set():
                    self._lost(error)

    def _failure(self) -> str | None:
        """What another process has told, or what has become of one beside this."""
        if self._store.check([KEY]):
            return self._store.get(KEY).decode()
        killed = self._killed()
        if killed and not self._stopped.is_set():
            return self._store.compare_set(KEY, "", killed).decode()
        return None

    def _killed(self, of_those_here: bool = False) -> str | None:
        """Which process of this machine is gone. Under torchrun they are the children of one parent.

        Looks once all have come, or at `of_those_here`.
        """
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return None
        first = self._peers.first_on_node_rank
        keys = {rank: f"process/{rank}" for rank in range(first, first + self._peers.local_world_size)}
        if of_those_here:
            keys = {rank: key for rank, key in keys.items() if self._store.check([key])}
        if set(self._pids) != set(keys):
            if not self._store.check(list(keys.values())):
                return None
            found = self._store.multi_get(list(keys.values()))
            self._pids = {rank: json.loads(each)["pid"] for rank, each in zip(keys, found, strict=True)}
        alive = children(self._parent)
        if os.getppid() != self._parent:
            return f"torchrun on {self._peers.host} was killed"
        dead = [rank for rank, pid in self._pids.items() if pid not in alive]
        return f"rank {dead[0]} on {self._peers.host} was killed" if dead else None

    def _first_here(self) -> bool:
        """Whether this is the first process of its machine to ask."""
        return self._store.add(f"ended/{self._peers.first_on_node_rank}", 1) == 1

    def _end(self, failure: str, status: int = 1) -> None:
        """End this process because of `failure`; the first one of the machine says so."""
        self._wait_for_another_end()
        if self._peers.local_rank:
            time.sleep(0.3 * SECONDS)
        if self._first_here():
            print(f"error: {failure}; {self._me} ends with it", file=sys.stderr, flush=True)
        os._exit(status)

    def _wait_for_another_end(self) -> None:
        """Another thread may be ending this process already, or this one, which a signal has interrupted."""
        if not self._ending.acquire(blocking=False):
            time.sleep(10 * SECONDS)

    def _lost(self, error: RuntimeError) -> None:
        """End this process, which cannot reach the store. Of a machine's processes that all have lost it, one
        says so: the one that gets an abstract socket's name, which it has for as long as the others look."""
        self._wait_for_another_end()
        if self._peers.local_rank:
            time.sleep(0.3 * SECONDS)
        name = f"\0markstep/{os.getppid()}/{self._peers.address}/{self._peers.first_on_node_rank}"
        with suppress(OSError), socket.socket(socket.AF_UNIX) as mine:
            mine.bind(name)
            print(
                f"error: {self._me} lost the connection to the store at {self._peers.address} "
                f"({str(error).splitlines()[0]})",
                file=sys.stderr,
                flush=True,
            )
            time.sleep(2.5 * SECONDS)
        os._exit(1)


@cache
def watch_job() -> Watch:
    """This process's watch over its job, which begins with the first call."""
    from parallel.runtime.peers import meet

    return Watch(meet())
