"""Moves the run that an output directory holds out of the way of a new one: --overwrite_output_dir."""

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from trainer.checkpoint.names import INCOMPLETE, NAME, not_written

FOLDER = "overwritten-"
OF_A_RUN = re.compile(rf"{NAME.pattern}({re.escape(INCOMPLETE)}|\.damaged-\d+)?")


def previous_checkpoints(output: Path) -> list[Path]:
    """The checkpoints of an earlier run in a directory, whole or not.

    Raises ValueError for a file or directory of such a name which no run has made: it would be in the way.
    """
    found = []
    for name in sorted(os.listdir(output) if os.path.isdir(output) else []):
        if OF_A_RUN.fullmatch(name):
            what = not_written(output / name)
            if what:
                raise ValueError(
                    f"--overwrite_output_dir: {output / name} is {what}, which no run has made: move it "
                    "away, or choose another --output_dir"
                )
            found.append(output / name)
    return found


def set_previous_aside(output: Path, files: Iterable[Path]) -> None:
    """Move an earlier run's checkpoints, and those of its other `files` that exist, into a new folder of the
    directory; nothing is deleted, and what no run has written stays.

    Raises ValueError where something cannot be moved; it is then where it was, or in the new folder.
    """
    moved = [*previous_checkpoints(output), *(file for file in files if file.exists())]
    if not moved:
        return
    number = 1
    while os.path.lexists(output / f"{FOLDER}{number}"):
        number += 1
    folder = output / f"{FOLDER}{number}"
    try:
        for path in moved:
            inside = path.relative_to(output) if path.is_relative_to(output) else Path("runs", path.name)
            (folder / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, folder / inside)
    except OSError as error:
        raise ValueError(f"--overwrite_output_dir: {path} cannot be moved: {error.strerror}") from None
    print(f"--overwrite_output_dir: the run that was here is now in {folder}; delete it when you want to")
