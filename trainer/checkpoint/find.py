"""Finding the checkpoint that a run resumes from."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parallel.buckets import Buckets
from parallel.runtime import Peers, SharedError, meet
from trainer.checkpoint.names import INCOMPLETE, MANIFEST, NAME, list_checkpoints, not_written
from trainer.checkpoint.previous import previous_checkpoints
from trainer.checkpoint.reader import Checkpoint


def find_checkpoint(
    output_dir: str,
    resume: str | None,
    overwrites: bool = False,
    buckets: Buckets | None = None,
    peers: Peers | None = None,
) -> Checkpoint | None:
    """The verified checkpoint that --resume names; None where the run starts from the beginning.

    The first process says which one the others try, and it is taken where all of them can read it. With
    `buckets`, each reads its rank's part of it, and all together verify it; without, it is verified as a
    whole. Raises ValueError where the checkpoint is damaged, and where `output_dir` holds files of another
    run (checkpoints, metrics.jsonl): a run either continues them or leaves them alone. Where it `overwrites`
    them (--overwrite_output_dir), the error is for what no run has made.
    """
    output, peers = Path(output_dir), peers or meet()
    names = _as_first_sees(peers, "checkpoints", lambda: _look(output, overwrites))
    if overwrites:
        return None
    present = [output / name for name in names]
    if resume == "latest":
        checkpoint = _latest(output, present, buckets, peers)
    else:
        checkpoint = None if resume is None else _read(Path(resume), buckets, peers)
        _as_first_sees(peers, "other runs", lambda: _check_other_runs(output, present, resume, checkpoint))
    step = checkpoint.step if checkpoint else 0
    _as_first_sees(peers, "names of checkpoints", lambda: _check_names(output, step))
    return checkpoint


def _as_first_sees(peers: Peers, name: str, look: Callable[[], Any]) -> Any:
    """What look() returns to the first process, in all of them; or its ValueError."""
    found = problem = None
    if peers.is_first:
        try:
            found = look()
        except ValueError as error:
            problem = str(error)
    peers.raise_together(name, problem)
    return peers.share(name, found)


def _look(output: Path, overwrites: bool) -> list[str]:
    """The names of the checkpoints in --output_dir, oldest first."""
    if os.path.exists(output) and not os.path.isdir(output):
        raise ValueError(f"--output_dir {output} is a file: a directory was expected")
    if overwrites:
        previous_checkpoints(output)
    return [path.name for _, path in list_checkpoints(output)]


def _check_other_runs(
    output: Path, present: list[Path], resume: str | None, checkpoint: Checkpoint | None
) -> None:
    """Raise ValueError where --output_dir holds a run that is not gone on with."""
    if checkpoint and checkpoint.path.resolve().parent == output.resolve():
        _check_step(checkpoint)
        if present and int(NAME.fullmatch(present[-1].name)[1]) > checkpoint.step:
            raise ValueError(
                f"--resume {resume}: {output} holds the later {present[-1].name}, "
                "which would be overwritten: pass --resume latest, or another --output_dir"
            )
        return
    left = present[-1] if present else output / "metrics.jsonl"
    if os.path.exists(left):
        way_out = "pass --resume latest to go on with it" if present else "move it away"
        raise ValueError(
            f"--output_dir {output} holds {left.name} of another run: {way_out}, "
            "or choose another --output_dir, or pass --overwrite_output_dir"
        )


def _latest(output: Path, present: list[Path], buckets: Buckets | None, peers: Peers) -> Checkpoint | None:
    """The newest undamaged checkpoint, or None where there is no checkpoint yet.

    None is no error, so that one command both starts a job and restarts it. Raises ValueError where all
    checkpoints are damaged.
    """

    def say(line):
        if peers.is_first:
            print(f"--resume latest: {line}")

    for name in sorted(os.listdir(output) if peers.is_first and os.path.isdir(output) else []):
        if name.endswith(INCOMPLETE) and NAME.fullmatch(name.removesuffix(INCOMPLETE)):
            say(f"{output / name} is incomplete, and skipped")
    for path in reversed(present):
        try:
            return _check_step(_read(path, buckets, peers))
        except ValueError as error:
            problem = error
            say(f"skipped: {error}")
    if present:
        raise ValueError(f"--resume latest: no checkpoint in {output} is whole; of the oldest, {problem}")
    say(f"{output} holds no checkpoint yet: the run starts from the beginning")
    return None


def _read(path: Path, buckets: Buckets | None, peers: Peers) -> Checkpoint:
    """The checkpoint in `path`, verified. Raises ValueError, in all processes, where one of them finds it
    damaged or cannot read it."""
    checkpoint = problem = None
    try:
        with peers.doing(f"reads {path}"):
            checkpoint = Checkpoint(path, peers.rank, peers.world_size)
            if buckets:
                checkpoint.load(buckets)
            else:
                checkpoint.verify()
    except OSError as error:
        problem = f"{path} cannot be read: {error}"
    except ValueError as error:
        problem = str(error)
    manifest = checkpoint.manifest["checksum"] if checkpoint else None
    found = peers.gather(f"reading {path.name}", [problem, manifest])
    bad = [rank for rank, (problem, _) in enumerate(found) if problem]
    odd = [rank for rank, (_, manifest) in enumerate(found) if manifest != found[0][1]]
    if not bad and not odd:
        return checkpoint
    rank = (bad or odd)[0]
    text = found[rank][0] or f"{path}: its {MANIFEST} is not the one that {peers.name_of(0)} has read"
    more = f", and {len(bad or odd) - 1} more ranks" if (bad or odd)[1:] else ""
    raise SharedError(text + (f" (says {peers.name_of(rank)}{more})" if peers.world_size > 1 else ""))


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
