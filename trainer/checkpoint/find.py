"""Finding the checkpoint that a run resumes from."""

import os
from pathlib import Path

from trainer.checkpoint.names import INCOMPLETE, NAME, list_checkpoints, not_written
from trainer.checkpoint.previous import previous_checkpoints
from trainer.checkpoint.reader import Checkpoint


def find_checkpoint(output_dir: str, resume: str | None, overwrites: bool = False) -> Checkpoint | None:
    """The verified checkpoint that --resume names; None where the run starts from the beginning.

    Raises ValueError where the checkpoint is damaged, and where `output_dir` holds files of another run
    (checkpoints, metrics.jsonl): a run either continues them or leaves them alone. Where it `overwrites` them
    (--overwrite_output_dir), the error is for what no run has made.
    """
    if overwrites:
        _check_is_directory(Path(output_dir))
        previous_checkpoints(Path(output_dir))
        return None
    checkpoint = _find(Path(output_dir), resume)
    _check_names(Path(output_dir), checkpoint.step if checkpoint else 0)
    return checkpoint


def _check_is_directory(output: Path) -> None:
    if os.path.exists(output) and not os.path.isdir(output):
        raise ValueError(f"--output_dir {output} is a file: a directory was expected")


def _find(output: Path, resume: str | None) -> Checkpoint | None:
    _check_is_directory(output)
    present = list_checkpoints(output)
    if resume == "latest":
        return _latest(output, present)
    checkpoint = None if resume is None else _verified(Path(resume))
    if checkpoint and checkpoint.path.resolve().parent == output.resolve():
        _check_step(checkpoint)
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
            "or choose another --output_dir, or pass --overwrite_output_dir"
        )
    return checkpoint


def _latest(output: Path, present: list[tuple[int, Path]]) -> Checkpoint | None:
    """The newest undamaged checkpoint, or None where there is no checkpoint yet.

    None is no error, so that one command both starts a job and restarts it. Raises ValueError where all
    checkpoints are damaged.
    """
    for name in sorted(os.listdir(output) if os.path.isdir(output) else []):
        if name.endswith(INCOMPLETE) and NAME.fullmatch(name.removesuffix(INCOMPLETE)):
            print(f"--resume latest: {output / name} is incomplete, and skipped")
    for _, path in reversed(present):
        try:
            return _check_step(_verified(path))
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


def _check_step(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint; raises ValueError where its name is that of another step."""
    match, step = NAME.fullmatch(checkpoint.path.name), checkpoint.step
    if match and int(match[1]) != step:
        raise ValueError(
            f"{checkpoint.path} is whole, but was renamed: it holds step {step}, so it was checkpoint-{step}"
        )
    return checkpoint


def _check_names(output: Path, done: int) -> None:
    """Raise ValueError where the user's own files bear a name that a save after `done` steps needs."""
    for name in sorted(os.listdir(output) if os.path.isdir(output) else []):
        match, path = NAME.fullmatch(name.removesuffix(INCOMPLETE)), output / name
        if not match or int(match[1]) <= done or name == match[0] and path.is_dir():
            continue
        what = not_written(path)
        if what:
            raise ValueError(
                f"{path} is {what}, which no run has made: move it away, for a save of step "
                f"{match[1]} needs the name"
            )
