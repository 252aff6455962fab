"""Files that are open for reading: only so many at once, however many a program reads from."""

import os
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Lock

MOST = 32  # files that are open at once in a process


@dataclass
class _Open:
    descriptor: int
    readers: int = 0


class Descriptors:
    """Opens files on demand, and closes those that were not read for the longest time. Threads may share it.

    A file that is being read is never closed: where `most` files are, who wants to read another one waits.
    """

    def __init__(self, most: int = MOST):
        self._most, self._open = most, OrderedDict()  # oldest use first
        self._changed = Condition(Lock())
        self._left: deque[object] = deque()  # keys of files to close, by whoever has the lock

    @contextmanager
    def reading(self, key: object, path: Path) -> Iterator[int]:
        """The descriptor of the file, which stays open within the context. `key` stands for one opened file:
        another file of the same path has another. Raises OSError where it cannot be opened."""
        with self._changed:
            self._close_left()
            while key not in self._open and len(self._open) >= self._most and not self._close_idle():
                self._changed.wait()
            if key not in self._open:
                self._open[key] = _Open(os.open(path, os.O_RDONLY))
            self._open.move_to_end(key)
            entry = self._open[key]
            entry.readers += 1
        try:
            yield entry.descriptor
        finally:
            with self._changed:
                entry.readers -= 1
                self._changed.notify_all()

    def close(self, key: object) -> None:
        """Close the file, unless it is being read or not open."""
        with self._changed:
            self._left.append(key)
            self._close_left()

    def close_later(self, key: object) -> None:
        """Close a file that nobody will read again; at once, where the lock is free.

        For `__del__`: garbage is collected at any moment, also while this thread has the lock and goes
        through the files that are open.
        """
        self._left.append(key)
        if self._changed.acquire(blocking=False):
            try:
                self._close_left()
            finally:
                self._changed.release()

    def _close_left(self) -> None:
        while self._left:
            key = self._left.popleft()
            if key in self._open and not self._open[key].readers:
                os.close(self._open.pop(key).descriptor)
                self._changed.notify_all()

    def _close_idle(self) -> bool:
        """Close the file that nobody reads and nobody has read for the longest time; False where all are
        being read."""
        idle = next((key for key, entry in self._open.items() if not entry.readers), None)
        if idle is not None:
            os.close(self._open.pop(idle).descriptor)
        return idle is not None
