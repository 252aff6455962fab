"""Finding the checkpoint that a run resumes from."""

import os
import re
from pathlib import Path

from trainer.checkpoint.names import INCOMPLETE, list_checkpoints
from trainer.checkpoint.reader import Checkpoint


def find_checkpoint(output_dir: str, resume: str | None) -> Checkpoint | None:
    """The verified checkpoint that --resume names; None where the run starts from the beginning.

    Raises ValueError where the checkpoint is damaged, and where `output_dir` holds files of another run
    (checkpoints, metrics.jsonl): a run either continues them or leaves them alone.
    """
    output = Path(output_dir)
    if os.path.exists(output) and not os.path.isdir(output):
        raise ValueError(f"--output_dir {output} is a file: a directory was expected")
    present = list_checkpoints(output)
    if resume == "latest":
        return _latest(output, present)
    checkpoint = None if resume is None else _verified(Path(resume))
    if checkpoint and checkpoint.path.resolve().parent == output.resolve():
        if present and present[-1][0] > checkpoint.step:
            raise ValueError(
                f"--resume {resume}: {output} holds the later {present[-1][1].name}, "
                "which would be overwritten: pass --resume latest, or another --output_dir"
            )
        return checkpoint
    left = present[-1][1] if present else output / "metrics.jsonl"
    if os.path.exists(left):
        way_out = "pass --resume latest to go on with it" if present else "move it away"
        raise ValueError(
            f"--output_dir {output} holds {left.name} of another run: {way_out}, "
            "or choose another --output_dir"
        )
    return checkpoint


def _latest(output: Path, present: list[tuple[int, Path]]) -> Checkpoint | None:
    """The newest undamaged checkpoint, or None where there is no checkpoint yet.

    None is no error, so that one command both starts a job and restarts it. Raises ValueError where all
    checkpoints are damaged.
    """
    for name in sorted(os.listdir(output) if os.path.isdir(output) else []):
        if re.fullmatch(r"checkpoint-\d+" + re.escape(INCOMPLETE), name):
            print(f"--resume latest: {output / name} is incomplete, and skipped")
    for _, path in reversed(present):
        try:
            return _verified(path)
        except ValueError as error:
            problem = error
            print(f"--resume latest: skipped: {error}")
    if present:
        raise ValueError(f"--resume latest: no checkpoint in {output} is whole; of the oldest, {problem}")
    print(f"--resume latest: {output} holds no checkpoint yet: the run starts from the beginning")
    return None


def _verified(path: Path) -> Checkpoint:
    """The checkpoint in `path`; raises ValueError where it is damaged or cannot be read."""
    try:
        checkpoint = Checkpoint(path)
        checkpoint.verify()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    return checkpoint
