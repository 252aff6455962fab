"""What a run does with the checkpoints of its directory that it no longer needs, or cannot use."""

import os
import shutil
import sys
from pathlib import Path

from trainer.checkpoint.manifest import read_eval_loss
from trainer.checkpoint.names import INCOMPLETE, NAME, list_checkpoints, not_written


def tidy_up(output: Path, first_step: int) -> None:
    """Delete what a killed run left incomplete; rename the checkpoints after `first_step`.

    Those cannot be used: --resume latest has skipped them, and said why.
    """
    for path in output.glob("checkpoint-*" + INCOMPLETE):
        if NAME.fullmatch(path.name.removesuffix(INCOMPLETE)) and not not_written(path):
            shutil.rmtree(path)
    for step, path in list_checkpoints(output):
        if step > first_step:
            print(f"{path} is renamed to {_set_aside(path).name}: a save may need its name")


def _set_aside(path: Path) -> Path:
    """Rename a checkpoint that cannot be used, so that a new one can have its name; returns the new path."""
    number = 1
    while os.path.lexists(path.with_name(f"{path.name}.damaged-{number}")):
        number += 1
    return path.rename(path.with_name(f"{path.name}.damaged-{number}"))


class OldCheckpoints:
    """Deletes all but the newest `limit` checkpoints and the one with the least evaluation loss; where there
    is no limit, none."""

    def __init__(self, output: Path, limit: int | None):
        self._output, self._limit = output, limit
        # A manifest of version 3 may have 150 MB, so each is read once.
        self._losses: dict[Path, float | None] = {}

    def prune(self, newest: Path, eval_loss: float | None) -> None:
        """To be called after each save, of the checkpoint `newest` with this loss.

        A checkpoint that cannot be deleted gives a warning: it is no reason to end a run.
        """
        if not self._limit:
            return
        self._losses[newest] = eval_loss
        present = list_checkpoints(self._output)
        for _, path in present:
            if path not in self._losses:
                self._losses[path] = read_eval_loss(path)
        losses = {path: loss for _, path in present if (loss := self._losses[path]) is not None}
        best = min(losses, key=losses.get, default=None)
        for _, old in present[: -self._limit]:
            if old != best and not old.is_symlink():  # a link is the user's
                doomed = old.with_name(old.name + INCOMPLETE)  # a half-deleted one must not look complete
                try:
                    os.rename(old, doomed)
                    shutil.rmtree(doomed)
                except OSError as error:
                    print(f"warning: {old} cannot be deleted: {error}", file=sys.stderr)
