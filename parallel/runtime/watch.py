"""A rank that is a process ends soon after another one has died: in a collective it would wait for it for
ever."""

import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

KEY = "failed"
SECONDS = 1.0  # between two looks


def children(parent: int) -> set[int]:
    """The process numbers of a parent's children that are alive."""
    alive = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, number, *_ = path.read_text().rsplit(")", 1)[1].split()
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
    """A thread that looks whether a rank has failed: on this node, because its process is gone, or because it
    was told so.

    `store`, in which the ranks of all nodes tell each other, must be used by nobody else: a wait would keep
    the thread waiting. The thread ends this process with status 1. Once a second it calls look(store) of each
    of `looks`, too, which must not wait.
    """

    def __init__(self, store, rank: int, looks: Sequence = ()):
        self._looks = looks
        self._store, self._rank, self._stopped = store, rank, threading.Event()
        threading.Thread(target=self._look, daemon=True).start()

    def tell(self, error: BaseException) -> None:
        """Let the other ranks know that this one ends with an error."""
        self._stopped.set()
        self._store.set(KEY, f"rank {self._rank} has failed: {' '.join(str(error).split())[:500]}")

    def stop(self) -> None:
        """Look no longer. To be called before a barrier, after which ranks may end."""
        self._stopped.set()

    def _look(self):
        while not self._stopped.wait(SECONDS):
            if not self._store.check([KEY]):
                # Under torchrun its children are the ranks of this node.
                ranks = int(os.environ["LOCAL_WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0
                if len(children(os.getppid())) >= ranks or self._stopped.is_set():
                    for each in self._looks:
                        each.look(self._store)
                    continue
                self._store.set(KEY, f"a process beside rank {self._rank} was killed")
            time.sleep(
                SECONDS
            )  # so that the one that failed is the first to end, and its error the first to be shown
            print(
                f"error: {self._store.get(KEY).decode()}; rank {self._rank} ends with it",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)
