"""Rank 0 waits for the files of the other ranks, and says whose have not come."""

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from trainer.checkpoint.names import INCOMPLETE, rank_file
from trainer.reporting.console import say

# Between two looks at a directory, which may be on a file system that many ranks wait for.
FIRST_LOOK_SECONDS, LOOK_SECONDS, LONGER = 0.02, 1.0, 1.5
SAY_SECONDS, SAY_AGAIN_SECONDS = 30, 60
PATIENCE_SECONDS = 3600
NAMED = 5  # ranks in a message


class LateFiles:
    """The files of a save that have not come yet, as rank 0 sees them.

    Ranks of several nodes need only the directory for this: no clock is compared, and no file is opened.
    """

    def __init__(self, directory: Path, writers: Sequence[int], name_of: Callable[[int], str]):
        """writers: the ranks that write a file. name_of(rank): its name, with its host."""
        self._directory, self._writers, self._name_of = directory, len(writers), name_of
        self._missing = list(writers)

    def look(self) -> list[int]:
        """The ranks whose files are still missing."""
        try:
            names = set(os.listdir(self._directory))
        except FileNotFoundError:  # a rank that failed has deleted it
            names = set()
        self._missing = [rank for rank in self._missing if rank_file(rank) not in names]
        return self._missing

    def wait(self, owner: threading.Thread, begun: float) -> bool:
        """Whether all files have come: False where the error of another rank has ended `owner`, the thread
        that trains.

        `begun` is the time.perf_counter() at which the save started. Says on stderr whose files are late.
        Raises OSError after PATIENCE_SECONDS.
        """
        pause, said = FIRST_LOOK_SECONDS, SAY_SECONDS
        while self.look():
            if not owner.is_alive():
                return False
            waited = time.perf_counter() - begun
            if waited > PATIENCE_SECONDS:
                raise OSError(f"{self}, after {PATIENCE_SECONDS} s: do all nodes share the directory?")
            if waited > said:
                said += SAY_AGAIN_SECONDS
                name = self._directory.name.removesuffix(INCOMPLETE)
                say(f"{name} was begun {waited:.0f} s ago: {self}", sys.stderr)
            time.sleep(pause)
            pause = min(LONGER * pause, LOOK_SECONDS)
        return True

    def __str__(self):
        """What is missing, in words."""
        missing = self._missing
        if not missing:
            return "its manifest is being written"
        more = f" and {len(missing) - NAMED:,} more" if len(missing) > NAMED else ""
        return (
            f"the files of {len(missing):,} of {self._writers:,} ranks are missing: "
            f"{', '.join(map(self._name_of, missing[:NAMED]))}{more}"
        )
